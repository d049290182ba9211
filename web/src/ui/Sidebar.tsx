import { memo } from "react";
import { go, routeTo, useSelect, useSession } from "../hooks";
import { sortedChats } from "../lib/store";
import { byAge } from "../lib/text";
import type { Chat } from "../lib/types";
import { Icon } from "./icons";
import { Mark } from "./Mark";

export function Sidebar({ chatId, onToggle }: { chatId: string | null; onToggle: () => void }) {
  const session = useSession();
  useSelect((s) => s.chats);
  const groups = byAge(sortedChats(session.store.get()), Date.now());
  return (
    <aside className="sidebar" aria-label="Chats" data-testid="sidebar">
      <div className="brand">
        <Mark size={30} />
        <span>rorqual</span>
        <button className="icon-button" onClick={onToggle} aria-label="Hide chats" title="Hide chats" data-testid="hide-sidebar">
          <Icon name="panel" />
        </button>
      </div>
      <a className="new-chat" href={routeTo(null)} data-testid="new-chat">
        <Icon name="plus" />
        New chat
      </a>
      <nav aria-label="Earlier chats">
        {groups.length === 0 && <p className="none">Your chats will be kept here, in this browser.</p>}
        {groups.map(([label, chats]) => (
          <section key={label}>
            <h2>{label}</h2>
            <ul>
              {chats.map(({ id, title }) => (
                <Row key={id} id={id} title={title} current={id === chatId} />
              ))}
            </ul>
          </section>
        ))}
      </nav>
    </aside>
  );
}

const Row = memo(function Row({ id, title, current }: Pick<Chat, "id" | "title"> & { current: boolean }) {
  const session = useSession();
  const remove = () => {
    session.delete(id);
    if (current) go(null);
  };
  return (
    <li data-testid="chat">
      <a href={routeTo(id)} aria-current={current ? "page" : undefined} title={title}>
        {title}
      </a>
      <button className="icon-button small" onClick={remove} aria-label={`Delete “${title}”`} title="Delete" data-testid="delete-chat">
        <Icon name="trash" size={16} />
      </button>
    </li>
  );
});
