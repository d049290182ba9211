import { memo } from "react";
import { useSession } from "../hooks";
import { statsOf } from "../lib/text";
import type { Answer } from "../lib/types";
import { Copy } from "./Copy";
import { Icon } from "./icons";
import { Markdown } from "./Markdown";
import { Thinking } from "./Thinking";

interface Props {
  chatId: string;
  answer: Answer;
  last: boolean;
}

/** Memoised: an answer that is finished is not drawn again while the next one streams. */
export const AnswerView = memo(function AnswerView({ chatId, answer, last }: Props) {
  const session = useSession();
  const live = answer.status === "streaming";
  const waiting = live && !answer.content && !answer.reasoning;
  const stats = statsOf(answer);
  return (
    <article className="answer" aria-label="Answer" aria-busy={live} data-testid="answer" data-status={answer.status}>
      {answer.reasoning && <Thinking answer={answer} />}
      {waiting && (
        <div className="waiting" aria-label="Waiting for the first word">
          <i />
          <i />
          <i />
        </div>
      )}
      {answer.content && (
        <div data-testid="answer-text">
          <Markdown text={answer.content} live={live} />
        </div>
      )}
      {!live && <Ending chatId={chatId} answer={answer} last={last} />}
      {!live && (answer.content || !answer.fault) && (
        <footer>
          {answer.content && <Copy text={() => answer.content} label="Copy answer" testId="copy-answer" />}
          {last && !answer.fault && (
            <button
              className="icon-button small"
              onClick={() => session.again(chatId)}
              aria-label="Answer again"
              title="Answer again"
              data-testid="regenerate"
            >
              <Icon name="again" size={16} />
            </button>
          )}
          {stats.length > 0 && (
            <p className="stats" data-testid="stats">
              {stats.map((part) => (
                <span key={part}>{part}</span>
              ))}
            </p>
          )}
        </footer>
      )}
    </article>
  );
});

/** How it ended, if not by itself. */
function Ending({ chatId, answer, last }: Props) {
  const session = useSession();
  if (answer.status === "done") return null;
  if (answer.status === "stopped") return <p className="note">Stopped</p>;
  const broken = answer.status === "interrupted";
  const needsKey = answer.fault?.status === 401;
  const failed = answer.content ? "The answer broke off" : "No answer";
  const title = broken ? "Interrupted" : needsKey ? "An API key is needed" : failed;
  return (
    <div className={broken ? "fault soft" : "fault"} role={last ? "alert" : undefined} data-testid="fault">
      <Icon name="warn" size={18} />
      <div>
        <strong>{title}</strong>
        <p>
          {answer.fault?.message ?? "The page was closed while this was being written."}
          {broken && answer.content && " What had come so far is kept."}
        </p>
      </div>
      {last && (
        <button className="button" onClick={() => session.again(chatId)} data-testid="retry">
          {needsKey ? "Enter key" : "Retry"}
        </button>
      )}
    </div>
  );
}
