import { type KeyboardEvent, type SubmitEvent, useEffect, useLayoutEffect, useRef, useState } from "react";
import { useSelect, useSession } from "../hooks";
import { currentModel } from "../lib/store";
import { Icon } from "./icons";

export function Composer({ chatId, busy, onAsk }: { chatId: string | null; busy: boolean; onAsk: (text: string) => void }) {
  const session = useSession();
  const thinking = useSelect((s) => s.settings.thinking);
  const thinks = useSelect((s) => currentModel(s)?.thinking === true);
  const [text, setText] = useState("");
  const area = useRef<HTMLTextAreaElement>(null);

  useLayoutEffect(() => fitHeight(area.current, 220), [text]);
  useEffect(() => {
    if (matchMedia("(hover: hover)").matches) area.current?.focus(); // no keyboard popping up on phones
  }, [chatId]);

  const submit = (event?: SubmitEvent) => {
    event?.preventDefault();
    if (busy || !text.trim()) return;
    setText("");
    onAsk(text.trim());
  };

  return (
    <div className="dock">
      <Notice />
      <form className="composer" onSubmit={submit}>
        <textarea
          ref={area}
          value={text}
          rows={1}
          placeholder="Message rorqual"
          aria-label="Message"
          enterKeyHint="send"
          data-testid="input"
          onChange={(event) => setText(event.target.value)}
          onKeyDown={(event) => {
            if (!sendsOnEnter(event)) return;
            event.preventDefault();
            submit();
          }}
        />
        <div className="bar">
          {thinks && (
            <button
              type="button"
              className="toggle"
              aria-pressed={thinking}
              title="Let the model reason before it answers"
              onClick={() => session.store.dispatch({ type: "settings", settings: { thinking: !thinking } })}
              data-testid="deepthink"
            >
              <Icon name="think" size={16} />
              DeepThink
            </button>
          )}
          {busy && chatId !== null ? (
            <button type="button" className="send stop" onClick={() => session.stop(chatId)} aria-label="Stop" title="Stop (Esc)" data-testid="stop">
              <span />
            </button>
          ) : (
            <button className="send" disabled={!text.trim()} aria-label="Send" title="Send (Enter)" data-testid="send">
              <Icon name="up" />
            </button>
          )}
        </div>
      </form>
      <p className="caution">A language model can be wrong. Check what matters.</p>
    </div>
  );
}

/** What stands in the way of a chat, above the place where one would start it. */
function Notice() {
  const session = useSession();
  const fault = useSelect((s) => s.modelsFault);
  const full = useSelect((s) => s.storageFull);
  if (fault) {
    return (
      <div className="fault" role="alert" data-testid="notice">
        <Icon name="warn" />
        <div>
          <p>{fault.message}</p>
        </div>
        <button className="button" onClick={() => void session.loadModels()}>
          {fault.status === 401 ? "Enter key" : "Retry"}
        </button>
      </div>
    );
  }
  if (!full) return null;
  return (
    <div className="fault soft" role="status" data-testid="notice">
      <Icon name="warn" />
      <p>This browser's storage is full or switched off: new messages will not survive a reload. Deleting old chats helps.</p>
    </div>
  );
}

/** Enter without Shift, and not the Enter that accepts a word from an input method. */
export function sendsOnEnter(event: KeyboardEvent): boolean {
  return event.key === "Enter" && !event.shiftKey && !event.nativeEvent.isComposing;
}

export function fitHeight(area: HTMLTextAreaElement | null, max: number): void {
  if (!area) return;
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight, max)}px`;
}
