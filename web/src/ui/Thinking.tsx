import { type SubmitEvent, useId, useLayoutEffect, useRef, useState } from "react";
import { useMemory, useNow, useSelect, useSession, useWords } from "../hooks";
import { roughTokens } from "../lib/cost";
import { duration, short } from "../lib/i18n";
import { isRunning, type Message } from "../lib/types";
import { fitHeight, IconButton } from "./bits";
import { Icon } from "./icons";
import { Markdown } from "./Markdown";

/** The model's reasoning: open while it thinks, folded when the answer starts, unless a person says otherwise. */
export function Thinking({ chat, message }: { chat: string; message: Message }) {
  const { t } = useWords();
  const session = useSession();
  const running = isRunning(message);
  const thinking = running && !message.content;
  const [choice, setChoice] = useMemory<boolean | null>(`thinking:${message.id}`, null);
  const editing = useSelect((s) => s.editing === `thought:${message.id}`);
  const open = choice ?? thinking;
  const id = useId();
  return (
    <section className={open ? "thinking open" : "thinking"} data-testid="thinking">
      <div className="thinking-head">
        <button type="button" className="fold" aria-expanded={open} aria-controls={id} onClick={() => setChoice(!open)} data-testid="thinking-toggle">
          <Icon name="think" size={16} />
          <Clock message={message} thinking={thinking} />
          <Icon name="chevron" size={16} />
        </button>
        {thinking && (
          <button type="button" className="word-button" onClick={() => void session.stop(chat, message.id, true)} data-testid="stop-thinking">
            <Icon name="skip" size={14} />
            <span>{t("think.stop")}</span>
          </button>
        )}
        {open && !running && !editing && !message.unsent && (
          <IconButton icon="edit" size={16} label={t("think.edit")} onClick={() => session.editing(`thought:${message.id}`)} testId="edit-thought" />
        )}
      </div>
      <div id={id} className="thoughts" hidden={!open} data-testid="thinking-text">
        {open && (editing ? <ThoughtEditor chat={chat} message={message} /> : <Markdown text={message.thinking ?? ""} live={thinking} />)}
      </div>
    </section>
  );
}

/** "Thinking… 3 s · 120 tokens", counted by the server when it has, by DeepSeek's rule until then. */
function Clock({ message, thinking }: { message: Message; thinking: boolean }) {
  const { t, language } = useWords();
  const now = useNow(thinking);
  const counted = message.thinking_tokens ?? message.usage?.reasoning_tokens;
  const tokens = counted || roughTokens(message.thinking ?? "");
  const seconds = thinking ? (now - (message.thinkingSince ?? now)) / 1000 : message.thinking_s;
  const time = duration(seconds ?? 0, language);
  return (
    <span className="clock">
      {thinking ? t("think.now", { time }) : seconds === null ? t("think.unknown") : t("think.done", { time })}
      <small>
        {counted ? "" : "≈ "}
        {t("ask.tokens", { n: tokens }).replace(/[\d,.]+/, tokens < 10_000 ? "$&" : short(tokens))}
      </small>
    </span>
  );
}

/** The thought as text: what is left in it is what the model goes on from. */
function ThoughtEditor({ chat, message }: { chat: string; message: Message }) {
  const { t } = useWords();
  const session = useSession();
  const [text, setText] = useState(message.thinking ?? "");
  const area = useRef<HTMLTextAreaElement>(null);
  useLayoutEffect(() => fitHeight(area.current, 420), [text]);
  const submit = (event: SubmitEvent) => {
    event.preventDefault();
    session.editing(null);
    void session.goOn(chat, message, text);
  };
  return (
    <form className="editor" onSubmit={submit}>
      <textarea
        ref={area}
        value={text}
        autoFocus
        aria-label={t("think.label")}
        onChange={(event) => setText(event.target.value)}
        onKeyDown={(event) => {
          if (event.key !== "Escape") return;
          event.preventDefault();
          session.editing(null);
        }}
        data-testid="thought-input"
      />
      <div>
        <button type="button" className="button" onClick={() => session.editing(null)}>
          {t("key.cancel")}
        </button>
        <button className="button primary" data-testid="thought-go">
          {t("think.goOn")}
        </button>
      </div>
    </form>
  );
}
