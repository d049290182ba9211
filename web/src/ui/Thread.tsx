import { memo, useEffect, useMemo, useRef } from "react";
import { Virtualizer } from "virtua";
import { MemoryContext, useFollow, useMessage, useSelect, useT } from "../hooks";
import type { Translate } from "../lib/i18n";
import { plain } from "../lib/prepare";
import { isRunning, type Message } from "../lib/types";
import { AnswerView } from "./AnswerView";
import { IconButton } from "./bits";
import { useRunning } from "./Composer";
import { QuestionView } from "./QuestionView";

/** Up to here all messages stay in the document, so that the browser's own search finds them. */
const ALL = 40;

const NO_PATH: readonly string[] = [];

export function Thread({ chat }: { chat: string }) {
  const t = useT();
  const path = useSelect((s) => s.threads[chat]?.path ?? NO_PATH);
  const { box, content, following, toEnd } = useFollow(chat);
  const memory = useRef(new Map<string, unknown>());
  const editing = useSelect((s) => s.editing);
  const last = path.at(-1);
  const running = useRunning(chat) !== null;
  const questions = useRef(last);
  useEffect(() => {
    if (questions.current !== last && running) toEnd(); // a question was asked: show it
    questions.current = last;
  }, [last]);
  const mounted = useMemo(() => {
    if (path.length <= ALL) return path.map((_, index) => index);
    const at = editing === null ? -1 : path.indexOf(editing.replace("thought:", ""));
    return at < 0 ? [] : [at];
  }, [path, editing]);

  return (
    <MemoryContext value={memory.current}>
      <div className="thread">
        <div className="scroll" ref={box} tabIndex={0} role="region" aria-label={t("thread.label")} data-testid="thread">
          <div className="column" ref={content}>
            <Virtualizer data={path} scrollRef={box} keepMounted={mounted} bufferSize={600}>
              {(id) => <Row key={id} chat={chat} id={id} last={id === last} />}
            </Virtualizer>
          </div>
        </div>
        {!following && (
          <IconButton icon="down" className="jump" label={t("thread.jump")} onClick={() => toEnd(path.length <= ALL)} testId="jump" />
        )}
        <Spoken chat={chat} />
      </div>
    </MemoryContext>
  );
}

const Row = memo(function Row({ chat, id, last }: { chat: string; id: string; last: boolean }) {
  const message = useMessage(chat, id);
  if (!message) return null;
  return (
    <div className={message.role === "user" ? "row ask" : "row"}>
      {message.role === "user" ? <QuestionView chat={chat} message={message} /> : <AnswerView chat={chat} message={message} last={last} />}
    </div>
  );
});

function Spoken({ chat }: { chat: string }) {
  const t = useT();
  const words = useSelect((s) => spoken(t, s.threads[chat]?.messages.get(s.threads[chat]?.path.at(-1) ?? "")));
  return (
    <p className="offscreen" role="status" aria-live="polite">
      {words}
    </p>
  );
}

/** For screen readers: what happens, and the answer once it is whole (not word by word). */
function spoken(t: Translate, last: Message | undefined): string {
  if (last?.role !== "assistant") return "";
  if (isRunning(last)) {
    if (last.content) return t("thread.answering");
    if (last.thinking) return t("thread.thinking");
    return last.search ? t("thread.searching") : t("answer.waiting");
  }
  if (last.status === "done") return t("thread.done", { text: plain(last.content) });
  return t("thread.ended", { how: last.error?.message || t(`answer.${last.status === "error" ? "failed" : last.status}` as "answer.failed") });
}
