import { useEffect } from "react";
import { useFollow } from "../hooks";
import type { Chat } from "../lib/types";
import { AnswerView } from "./AnswerView";
import { Icon } from "./icons";
import { QuestionView } from "./QuestionView";

export function Thread({ chat, busy }: { chat: Chat; busy: boolean }) {
  const { box, content, following, toEnd } = useFollow(chat.id);
  const last = chat.messages.at(-1);
  const lastQuestion = chat.messages.findLastIndex((m) => m.role === "user");
  useEffect(() => toEnd(), [last?.id]); // a question was asked: show it

  return (
    <div className="thread">
      <div className="scroll" ref={box} data-testid="thread">
        <div className="column" ref={content}>
          {chat.messages.map((message, index) =>
            message.role === "user" ? (
              <QuestionView
                key={message.id}
                chatId={chat.id}
                question={message}
                editable={index === lastQuestion && !busy}
              />
            ) : (
              <AnswerView key={message.id} chatId={chat.id} answer={message} last={message === last} />
            ),
          )}
        </div>
      </div>
      {!following && (
        <button className="jump" onClick={() => toEnd(!busy)} aria-label="Jump to latest" title="Jump to latest" data-testid="jump">
          <Icon name="down" />
        </button>
      )}
      <p className="offscreen" role="status" aria-live="polite">
        {spoken(chat, busy)}
      </p>
    </div>
  );
}

/** For screen readers: what happens, and the answer once it is whole (not word by word). */
function spoken(chat: Chat, busy: boolean): string {
  const last = chat.messages.at(-1);
  if (last?.role !== "assistant") return "";
  if (busy) return last.content ? "Answering" : last.reasoning ? "Thinking" : "Waiting for an answer";
  return last.status === "done" ? `Answer: ${last.content}` : `Answer ${last.status}`;
}
