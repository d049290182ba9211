import { useEffect, useId, useMemo, useRef, useState } from "react";
import { go, useSession, useT } from "../hooks";
import { LANGUAGES, type Language, type Translate } from "../lib/i18n";
import type { Session } from "../lib/session";
import { settingsOf } from "../lib/store";
import type { Summary } from "../lib/types";
import { type IconName, Icon } from "./icons";
import { Keys } from "./Keys";
import { THEMES, themeOf } from "./SettingsMenu";

interface Entry {
  id: string;
  icon: IconName;
  name: string;
  keys?: readonly string[];
  run: () => void;
}

/** Every command and every chat, by a few letters. A combobox over a list, as ARIA has it. */
export function Palette({ chat, onClose }: { chat: string | null; onClose: () => void }) {
  const t = useT();
  const session = useSession();
  const [text, setText] = useState("");
  const [at, setAt] = useState(0);
  const chats = useFound(session, text);
  const list = useRef<HTMLUListElement>(null);
  const id = useId();
  const words = text.trim().toLowerCase();
  const commands = useMemo(() => commandsOf(session, t, chat).filter((c) => c.name.toLowerCase().includes(words)), [session, t, chat, words]);
  const found = useMemo(
    () => chats.slice(0, 12).map((c): Entry => ({ id: c.id, icon: c.pinned ? "pin" : "chat", name: c.title, run: () => go(c.id) })),
    [chats],
  );
  const entries = words ? [...found, ...commands] : [...commands, ...found];
  const chosen = Math.min(at, entries.length - 1);
  useEffect(() => void list.current?.querySelector("[aria-selected=true]")?.scrollIntoView({ block: "nearest" }), [chosen]);
  const run = (entry: Entry | undefined) => {
    if (!entry) return;
    onClose();
    setTimeout(entry.run); // after the dialog has given the focus back
  };
  return (
    <>
      <div className="palette-head">
        <Icon name="search" />
        <input
          role="combobox"
          aria-expanded="true"
          aria-controls={id}
          aria-activedescendant={entries[chosen] && `${id}-${chosen}`}
          aria-label={t("palette.placeholder")}
          placeholder={t("palette.placeholder")}
          value={text}
          autoFocus
          onChange={(event) => {
            setText(event.target.value);
            setAt(0);
          }}
          onKeyDown={(event) => {
            const step = event.key === "ArrowDown" ? 1 : event.key === "ArrowUp" ? -1 : 0;
            if (step) setAt((chosen + step + entries.length) % entries.length);
            else if (event.key === "Enter" && !event.nativeEvent.isComposing) run(entries[chosen]);
            else return;
            event.preventDefault();
          }}
          data-testid="palette-input"
        />
      </div>
      {entries.length === 0 && <p className="none" role="status">{t("palette.nothing")}</p>}
      <ul role="listbox" id={id} ref={list} aria-label={t("palette.title")}>
        {entries.map((entry, index) => (
          <li
            key={entry.id}
            id={`${id}-${index}`}
            role="option"
            aria-selected={index === chosen}
            onPointerMove={() => setAt(index)}
            onClick={() => run(entry)}
            data-testid="palette-entry"
          >
            <Icon name={entry.icon} size={16} />
            <span>{entry.name}</span>
            {entry.keys && <Keys keys={entry.keys} />}
          </li>
        ))}
      </ul>
    </>
  );
}

const PAUSE_MS = 120;

/** The chats that the words are found in; the newest without words. */
function useFound(session: Session, text: string): readonly Summary[] {
  const [found, setFound] = useState<{ text: string; chats: readonly Summary[] }>(() => ({ text: "", chats: session.store.get().list.chats }));
  useEffect(() => {
    let here = true;
    const timer = setTimeout(() => {
      session.api.list(text.trim(), null).then(({ chats }) => here && setFound({ text, chats }), () => undefined);
    }, PAUSE_MS);
    return () => {
      here = false;
      clearTimeout(timer);
    };
  }, [session, text]);
  // Until the server has answered for these words, those that the last answer's titles hold.
  const words = text.trim().toLowerCase();
  return useMemo(() => (found.text === text ? found.chats : found.chats.filter((c) => c.title.toLowerCase().includes(words))), [found, text, words]);
}

function commandsOf(session: Session, t: Translate, chat: string | null): Entry[] {
  const settings = settingsOf(session.store.get(), chat);
  const setup = session.store.get().setup;
  const thinks = setup?.models.find((m) => m.id === settings.model)?.thinking;
  const entries: (Entry | false | undefined)[] = [
    { id: "new", icon: "pencil", name: t("side.new"), keys: ["Ctrl", "Shift", "O"], run: () => go(null) },
    { id: "focus", icon: "edit", name: t("palette.focus"), keys: ["Shift", "Esc"], run: focusInput },
    thinks && { id: "think", icon: "think", name: t("palette.think"), keys: ["Alt", "T"], run: () => session.settings(chat, { thinking: !settings.thinking }) },
    setup?.search.available && { id: "search", icon: "globe", name: t("palette.search"), keys: ["Alt", "S"], run: () => session.settings(chat, { search: !settings.search }) },
    ...THEMES.map((name): Entry => ({
      id: `theme-${name}`,
      icon: "sun",
      name: t("palette.theme", { name: t(`settings.theme.${name}`) }),
      run: () => session.prefs({ theme: themeOf(name) }),
    })),
    ...Object.entries(LANGUAGES).map(([code, { name }]): Entry => ({
      id: `language-${code}`,
      icon: "globe",
      name: t("palette.language", { name }),
      run: () => session.prefs({ language: code as Language }),
    })),
    { id: "keys", icon: "keys", name: t("keys.title"), keys: ["Ctrl", "/"], run: () => session.store.set({ dialog: "keys" }) },
  ];
  return entries.filter((entry): entry is Entry => Boolean(entry));
}

export const focusInput = (): void => document.querySelector<HTMLTextAreaElement>(".composer textarea")?.focus();
