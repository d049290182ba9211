import { memo, useEffect, useRef, useState } from "react";
import { routeTo, useSelect, useSession, useT } from "../hooks";
import type { Key } from "../lib/i18n";
import type { Summary } from "../lib/types";
import { IconButton } from "./bits";
import { ChatRow } from "./ChatRow";
import { Icon } from "./icons";
import { Mark } from "./Mark";
import { SettingsMenu } from "./SettingsMenu";

export const Sidebar = memo(function Sidebar({ chat, onToggle, onPick }: { chat: string | null; onToggle: () => void; onPick: () => void }) {
  const t = useT();
  return (
    <aside className="sidebar" aria-label={t("side.label")} onClick={(event) => (event.target as Element).closest("a") && onPick()} data-testid="sidebar">
      <div className="brand">
        <Mark size={28} />
        <span>rorqual</span>
        <IconButton icon="panel" label={t("side.hide")} onClick={onToggle} testId="hide-sidebar" />
      </div>
      <a className="new-chat" href={routeTo(null)} data-testid="new-chat">
        <Icon name="pencil" />
        {t("side.new")}
      </a>
      <SearchBox />
      <List chat={chat} />
      <SettingsMenu />
    </aside>
  );
});

const PAUSE_MS = 180;

function SearchBox() {
  const t = useT();
  const session = useSession();
  const [text, setText] = useState("");
  const asked = useRef("");
  useEffect(() => {
    if (text.trim() === asked.current) return;
    const timer = setTimeout(() => {
      asked.current = text.trim();
      void session.searchChats(asked.current);
    }, PAUSE_MS);
    return () => clearTimeout(timer);
  }, [text, session]);
  return (
    <div className="side-search" role="search">
      <Icon name="search" size={16} />
      <input
        type="search"
        value={text}
        placeholder={t("side.search")}
        aria-label={t("side.search")}
        onChange={(event) => setText(event.target.value)}
        onKeyDown={(event) => {
          if (event.key !== "Escape" || !text) return;
          event.preventDefault();
          setText("");
        }}
        data-testid="search-chats"
      />
      {text && <IconButton icon="close" size={14} label={t("side.clear")} onClick={() => setText("")} />}
    </div>
  );
}

function List({ chat }: { chat: string | null }) {
  const t = useT();
  const session = useSession();
  const { chats, next, query, loaded } = useSelect((s) => s.list);
  const groups: [Key | null, Summary[]][] = query ? [[null, chats]] : byAge(chats, Date.now());
  return (
    <nav aria-label={t("side.label")}>
      <p className="offscreen" role="status">
        {query && loaded ? t("side.found", { n: chats.length }) : ""}
      </p>
      {loaded && !chats.length && <p className="none">{query ? t("side.nothing", { query }) : t("side.none")}</p>}
      {groups.map(([label, some]) => (
        <section key={label}>
          {label && <h2>{t(label)}</h2>}
          <ul>
            {some.map((summary) => (
              <ChatRow key={summary.id} summary={summary} current={summary.id === chat} />
            ))}
          </ul>
        </section>
      ))}
      {next !== null && (
        <button type="button" className="more" onClick={() => void session.moreChats()} data-testid="more-chats">
          {t("side.more")}
        </button>
      )}
    </nav>
  );
}

/** Chats under the headings of the sidebar, in the order they come in. `now` is in ms. */
export function byAge(chats: readonly Summary[], now: number): [Key, Summary[]][] {
  const day = 86_400;
  const midnight = new Date(now).setHours(0, 0, 0, 0) / 1000;
  const heading = ({ pinned, updated }: Summary): Key => {
    if (pinned) return "side.pinned";
    if (updated >= midnight) return "side.today";
    if (updated >= midnight - day) return "side.yesterday";
    return updated >= midnight - 7 * day ? "side.week" : "side.older";
  };
  const found = new Map<Key, Summary[]>();
  for (const chat of chats) found.set(heading(chat), [...(found.get(heading(chat)) ?? []), chat]);
  return [...found];
}
