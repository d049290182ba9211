import { memo, useDeferredValue, useMemo } from "react";
import { useSelect, useSession, useT } from "../hooks";
import { plain } from "../lib/prepare";
import { isRunning, type Message, phaseOf } from "../lib/types";
import { Copy, IconButton } from "./bits";
import { SourcesContext } from "./Citation";
import { Icon } from "./icons";
import { Markdown } from "./Markdown";
import { SearchStrip } from "./SearchStrip";
import { Siblings } from "./Siblings";
import { Thinking } from "./Thinking";

interface Props {
  chat: string;
  message: Message;
  last: boolean;
}

/** Memoised: an answer that is finished is not drawn again while the next one streams. */
export const AnswerView = memo(function AnswerView({ chat, message, last }: Props) {
  const t = useT();
  const session = useSession();
  const live = isRunning(message);
  const waiting = live && !message.content && !message.thinking && phaseOf(message) === "done";
  const sources = message.search?.sources;
  const context = useMemo(
    () => (sources ? { sources, open: (n: number) => session.show({ kind: "sources", message: message.id, n }) } : null),
    [sources, message.id, session],
  );
  return (
    <SourcesContext value={context}>
      <article className="answer" aria-label={t("answer.label")} aria-busy={live} data-testid="answer" data-status={message.status}>
        {message.search && <SearchStrip message={message} search={message.search} />}
        {message.thinking && <Thinking chat={chat} message={message} />}
        {waiting && (
          <div className="waiting" role="img" aria-label={t("answer.waiting")}>
            <i />
            <i />
            <i />
          </div>
        )}
        {message.content && (
          <div data-testid="answer-text">
            <Text message={message} live={live} />
          </div>
        )}
        {!live && <Ending chat={chat} message={message} last={last} />}
        {!live && <Foot chat={chat} message={message} last={last} />}
      </article>
    </SourcesContext>
  );
});

/** A finished answer that comes into view is plain for a moment: React renders its Markdown in slices between the
 *  frames, so that scrolling through long answers never waits for a parser. */
function Text({ message, live }: { message: Message; live: boolean }) {
  const ready = useDeferredValue(true, live);
  if (!ready) return <div className="md plain">{plain(message.content)}</div>;
  return <Markdown text={message.content} live={live} checks={message.checks} />;
}

function Foot({ chat, message, last }: Props) {
  const t = useT();
  const session = useSession();
  const several = useSelect((s) => (s.setup?.models.length ?? 0) > 1);
  const { usage } = message;
  const stats = [
    several && message.model,
    usage && usage.completion_tokens > 0 && t("answer.tokens", { n: usage.completion_tokens }),
    usage?.tokens_per_s && t("answer.speed", { n: rounded(usage.tokens_per_s) }),
  ].filter((part) => typeof part === "string");
  return (
    <footer className={last ? "foot" : "foot past"}>
      <Siblings chat={chat} message={message} />
      {message.content && <Copy text={() => plain(message.content)} label={t("answer.copy")} testId="copy-answer" />}
      {message.status !== "error" && (
        <IconButton icon="again" size={16} label={t("answer.again")} onClick={() => session.again(chat, message)} testId="regenerate" />
      )}
      {stats.length > 0 && (
        <p className="stats" data-testid="stats">
          {stats.map((part) => (
            <span key={part}>{part}</span>
          ))}
        </p>
      )}
    </footer>
  );
}

const rounded = (n: number) => (n < 10 ? Math.round(n * 10) / 10 : Math.round(n));

const ENDINGS = { stopped: "answer.stopped", length: "answer.length", cut: "answer.cut" } as const;

/** How it ended, if not by itself, and the way on from there. */
function Ending({ chat, message, last }: Props) {
  const t = useT();
  const session = useSession();
  const { status } = message;
  if (status === "done") return message.content ? null : <p className="note">{t("answer.empty")}</p>;
  if (status === "stopped" || status === "length" || status === "cut") {
    return (
      <div className="note" data-testid="ending">
        <span>{t(ENDINGS[status])}</span>
        {last && (
          <button type="button" className="button small" onClick={() => void session.goOn(chat, message)} data-testid="continue">
            <Icon name="play" size={14} />
            {t("answer.continue")}
          </button>
        )}
      </div>
    );
  }
  const needsKey = message.error?.code === "401";
  const title = needsKey ? t("answer.needsKey") : t(message.content ? "answer.broken" : "answer.failed");
  return (
    <div className="fault" role={last ? "alert" : undefined} data-testid="fault">
      <Icon name="warn" size={18} />
      <div>
        <strong>{title}</strong>
        <p>{message.error?.message || t("ask.unreachable")}</p>
      </div>
      {last && message.content && !message.unsent && (
        <button type="button" className="button" onClick={() => void session.goOn(chat, message)} data-testid="continue">
          {t("answer.continue")}
        </button>
      )}
      <button
        type="button"
        className="button"
        onClick={() => (needsKey && !session.store.get().key ? session.store.set({ askKey: true }) : session.again(chat, message))}
        data-testid="retry"
      >
        {t("ask.retry")}
      </button>
    </div>
  );
}
