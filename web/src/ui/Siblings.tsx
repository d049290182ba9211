import { useSelect, useSession, useT } from "../hooks";
import { siblingsOf } from "../lib/tree";
import type { Message } from "../lib/types";
import { IconButton } from "./bits";

/** The arrows between versions of a question or an answer. */
export function Siblings({ chat, message }: { chat: string; message: Message }) {
  const t = useT();
  const session = useSession();
  const siblings = useSelect((s) => {
    const thread = s.threads[chat];
    return thread && siblingsOf(thread.messages, thread.children, message.id);
  });
  if (!siblings || siblings.length < 2) return null;
  const at = siblings.indexOf(message.id);
  const to = (step: number) => {
    const next = siblings[at + step];
    if (next) session.choose(chat, next);
  };
  return (
    <div className="siblings" role="group" aria-label={t("answer.version", { n: at + 1, all: siblings.length })} data-testid="siblings">
      <IconButton icon="left" size={16} label={t("answer.previous")} disabled={at === 0} onClick={() => to(-1)} testId="sibling-previous" />
      <span aria-hidden="true">
        {at + 1}/{siblings.length}
      </span>
      <IconButton icon="right" size={16} label={t("answer.next")} disabled={at === siblings.length - 1} onClick={() => to(1)} testId="sibling-next" />
    </div>
  );
}
