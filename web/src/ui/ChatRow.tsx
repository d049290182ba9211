import { memo, type ReactNode, useState } from "react";
import { go, routeTo, useSession, useT } from "../hooks";
import type { Summary } from "../lib/types";
import { IconButton, MenuItem, MenuOf, saveFile } from "./bits";

export const ChatRow = memo(function ChatRow({ summary, current }: { summary: Summary; current: boolean }) {
  const t = useT();
  const [naming, setNaming] = useState(false);
  const { id, title, match, running } = summary;
  const session = useSession();
  const found = match?.message;
  if (naming) {
    return (
      <li data-testid="chat">
        <Naming id={id} title={title} onClose={() => setNaming(false)} />
      </li>
    );
  }
  return (
    <li data-testid="chat" className={running ? "running" : undefined}>
      <a
        href={routeTo(id)}
        aria-current={current ? "page" : undefined}
        title={title}
        onClick={() => found && session.store.set({ reveal: { chat: id, message: found } })}
        onDoubleClick={() => setNaming(true)}
      >
        {match?.message === null ? <Marked text={match.text} ranges={match.ranges} /> : title}
        {running && <span className="offscreen">, {t("side.running")}</span>}
        {match && match.message !== null && (
          <small data-testid="match">
            <Marked text={match.text} ranges={match.ranges} />
          </small>
        )}
      </a>
      <MenuOf
        label={t("side.actions", { title })}
        align="start"
        trigger={<IconButton icon="more" size={16} label={t("side.actions", { title })} testId="chat-menu" />}
      >
        <ChatActions id={id} pinned={summary.pinned} current={current} onRename={() => setNaming(true)} />
      </MenuOf>
    </li>
  );
});

/** What can be done with a conversation, as items of a menu. */
export function ChatActions({ id, pinned, current, onRename }: { id: string; pinned: boolean; current: boolean; onRename: () => void }) {
  const t = useT();
  const session = useSession();
  const download = async (format: "markdown" | "json") => {
    const file = await session.download(id, format);
    if (file) saveFile(file.name, file.body);
  };
  const remove = () => {
    if (current) go(null);
    void session.delete(id, { deleted: t("chat.deleted"), undo: t("chat.undo") });
  };
  return (
    <>
      <MenuItem icon="edit" onClick={onRename} testId="rename">
        {t("chat.rename")}
      </MenuItem>
      <MenuItem icon="pin" onClick={() => void session.pin(id, !pinned)} testId="pin">
        {t(pinned ? "chat.unpin" : "chat.pin")}
      </MenuItem>
      <MenuItem icon="download" onClick={() => void download("markdown")} testId="export-markdown">
        {t("chat.export.markdown")}
      </MenuItem>
      <MenuItem icon="download" onClick={() => void download("json")} testId="export-json">
        {t("chat.export.json")}
      </MenuItem>
      <MenuItem icon="trash" danger onClick={remove} testId="delete-chat">
        {t("chat.delete")}
      </MenuItem>
    </>
  );
}

/** The field that renames a conversation: Enter or leaving it saves, Escape does not. */
export function Naming({ id, title, className = "", onClose }: { id: string; title: string; className?: string; onClose: () => void }) {
  const t = useT();
  const session = useSession();
  const [text, setText] = useState(title);
  const save = () => {
    onClose();
    const name = text.trim();
    if (name && name !== title) void session.rename(id, name);
  };
  return (
    <input
      className={`naming ${className}`}
      value={text}
      autoFocus
      maxLength={200}
      aria-label={t("chat.title")}
      onFocus={(event) => event.target.select()}
      onChange={(event) => setText(event.target.value)}
      onBlur={save}
      onKeyDown={(event) => {
        if (event.key === "Enter" && !event.nativeEvent.isComposing) save();
        if (event.key !== "Escape") return;
        event.preventDefault();
        onClose();
      }}
      data-testid="rename-input"
    />
  );
}

/** Text with the found words marked. */
function Marked({ text, ranges }: { text: string; ranges: [number, number][] }) {
  const parts: ReactNode[] = [];
  let from = 0;
  for (const [start, end] of ranges) {
    if (start < from) continue;
    parts.push(text.slice(from, start), <mark key={start}>{text.slice(start, end)}</mark>);
    from = end;
  }
  return (
    <>
      {parts}
      {text.slice(from)}
    </>
  );
}

