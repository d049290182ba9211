import { memo, type SubmitEvent, useLayoutEffect, useRef, useState } from "react";
import { useSelect, useSession, useT } from "../hooks";
import type { Message } from "../lib/types";
import { FileChip } from "./Attachments";
import { Copy, fitHeight, IconButton, sendsOnEnter } from "./bits";
import { Siblings } from "./Siblings";

export const QuestionView = memo(function QuestionView({ chat, message }: { chat: string; message: Message }) {
  const t = useT();
  const session = useSession();
  const editing = useSelect((s) => s.editing === message.id);
  if (editing) return <Editor chat={chat} message={message} />;
  return (
    <article className="question" aria-label={t("you.label")} data-testid="question">
      {message.files.length > 0 && (
        <ul className="chips" aria-label={t("ask.attach")}>
          {message.files.map((file) => (
            <FileChip key={file.id} name={file.name} info={file} />
          ))}
        </ul>
      )}
      <div className="bubble">{message.content}</div>
      <footer>
        <Copy text={() => message.content} label={t("you.copy")} />
        {!message.unsent && <IconButton icon="edit" size={16} label={t("you.edit")} onClick={() => session.editing(message.id)} testId="edit" />}
        <Siblings chat={chat} message={message} />
      </footer>
    </article>
  );
});

function Editor({ chat, message }: { chat: string; message: Message }) {
  const t = useT();
  const session = useSession();
  const [text, setText] = useState(message.content);
  const area = useRef<HTMLTextAreaElement>(null);
  useLayoutEffect(() => fitHeight(area.current, 320), [text]);
  const close = () => session.editing(null);
  const submit = (event?: SubmitEvent) => {
    event?.preventDefault();
    if (!text.trim()) return;
    close();
    session.edit(chat, message, text.trim());
  };
  return (
    <form className="editor" onSubmit={submit}>
      <textarea
        ref={area}
        value={text}
        rows={1}
        autoFocus
        aria-label={t("you.edit")}
        data-testid="edit-input"
        onFocus={(event) => event.target.setSelectionRange(text.length, text.length)}
        onChange={(event) => setText(event.target.value)}
        onKeyDown={(event) => {
          if (sendsOnEnter(event)) {
            event.preventDefault();
            submit();
          } else if (event.key === "Escape") {
            event.preventDefault();
            close();
          }
        }}
      />
      <div>
        <button type="button" className="button" onClick={close}>
          {t("key.cancel")}
        </button>
        <button className="button primary" disabled={!text.trim()} data-testid="edit-send">
          {t("ask.send")}
        </button>
      </div>
    </form>
  );
}
