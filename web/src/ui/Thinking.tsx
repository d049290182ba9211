import { useId, useState } from "react";
import { useNow } from "../hooks";
import { seconds } from "../lib/text";
import type { Answer } from "../lib/types";
import { Icon } from "./icons";
import { Markdown } from "./Markdown";

/** The model's reasoning: open while it thinks, folded when the answer starts, unless a person says. */
export function Thinking({ answer }: { answer: Answer }) {
  const thinking = answer.status === "streaming" && answer.thinkingMs === undefined;
  const [choice, setChoice] = useState<boolean | null>(null);
  const now = useNow(thinking);
  const open = choice ?? thinking;
  const id = useId();
  return (
    <section className={open ? "thinking open" : "thinking"} data-testid="thinking">
      <button aria-expanded={open} aria-controls={id} onClick={() => setChoice(!open)} data-testid="thinking-toggle">
        <Icon name="think" size={16} />
        {thinking
          ? `Thinking… ${seconds(now - (answer.thinkingSince ?? now))}`
          : `Thought for ${seconds(answer.thinkingMs ?? 0)}`}
        <Icon name="chevron" size={16} />
      </button>
      <div id={id} className="thoughts" hidden={!open} data-testid="thinking-text">
        {open && <Markdown text={answer.reasoning} live={thinking} />}
      </div>
    </section>
  );
}
