import { memo, type RefObject, useEffect, useMemo, useRef } from "react";
import { Virtualizer, type VirtualizerHandle } from "virtua";
import { MemoryContext, useFollow, useMessage, useSelect, useSession, useT } from "../hooks";
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
  const { box, content, following, toEnd, hold } = useFollow(chat);
  const list = useRef<VirtualizerHandle>(null);
  const revealed = useReveal(chat, path, list, hold);
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
            <Virtualizer ref={list} data={path} scrollRef={box} keepMounted={mounted} bufferSize={600}>
              {(id) => <Row key={id} chat={chat} id={id} last={id === last} found={id === revealed} />}
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

const SHOWN_MS = 2500;

/** Goes to the message that a search has found, on whichever branch it is. Returns its id for a moment. */
function useReveal(chat: string, path: readonly string[], list: RefObject<VirtualizerHandle | null>, hold: () => void): string | null {
  const session = useSession();
  const id = useSelect((s) => (s.reveal?.chat === chat ? s.reveal.message : null));
  useEffect(() => {
    if (id === null) return;
    const index = path.indexOf(id);
    if (index < 0) {
      if (session.store.get().threads[chat]?.messages.has(id)) session.choose(chat, id);
      return;
    }
    hold();
    list.current?.scrollToIndex(index, { align: "center" });
    const timer = setTimeout(() => session.store.set({ reveal: null }), SHOWN_MS);
    return () => clearTimeout(timer);
  }, [chat, id, path]);
  return id;
}

const Row = memo(function Row({ chat, id, last, found }: { chat: string; id: string; last: boolean; found: boolean }) {
  const message = useMessage(chat, id);
  if (!message) return null;
  return (
    <div className={`row${message.role === "user" ? " ask" : ""}${found ? " found" : ""}`}>
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
