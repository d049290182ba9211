import { memo, type SubmitEvent, useLayoutEffect, useRef, useState } from "react";
import { useSession } from "../hooks";
import type { Question } from "../lib/types";
import { fitHeight, sendsOnEnter } from "./Composer";
import { Icon } from "./icons";

interface Props {
  chatId: string;
  question: Question;
  editable: boolean;
}

export const QuestionView = memo(function QuestionView({ chatId, question, editable }: Props) {
  const [editing, setEditing] = useState(false);
  if (editing) return <Editor chatId={chatId} question={question} onClose={() => setEditing(false)} />;
  return (
    <article className="question" aria-label="Question" data-testid="question">
      {editable && (
        <button
          className="icon-button small edit"
          onClick={() => setEditing(true)}
          aria-label="Edit question"
          title="Edit"
          data-testid="edit"
        >
          <Icon name="edit" size={16} />
        </button>
      )}
      <div className="bubble">{question.content}</div>
    </article>
  );
});

function Editor({ chatId, question, onClose }: { chatId: string; question: Question; onClose: () => void }) {
  const session = useSession();
  const [text, setText] = useState(question.content);
  const area = useRef<HTMLTextAreaElement>(null);
  useLayoutEffect(() => fitHeight(area.current, 320), [text]);
  const submit = (event?: SubmitEvent) => {
    event?.preventDefault();
    if (!text.trim()) return;
    session.edit(chatId, question.id, text.trim());
    onClose();
  };
  return (
    <form className="editor" onSubmit={submit}>
      <textarea
        ref={area}
        value={text}
        rows={1}
        autoFocus
        aria-label="Edit question"
        data-testid="edit-input"
        onFocus={(event) => event.target.setSelectionRange(text.length, text.length)}
        onChange={(event) => setText(event.target.value)}
        onKeyDown={(event) => {
          if (sendsOnEnter(event)) submit();
          if (event.key === "Escape") {
            event.preventDefault();
            onClose();
          }
        }}
      />
      <div>
        <button type="button" className="button" onClick={onClose}>
          Cancel
        </button>
        <button className="button primary" disabled={!text.trim()} data-testid="edit-send">
          Send
        </button>
      </div>
    </form>
  );
}
