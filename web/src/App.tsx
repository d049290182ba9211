import { useCallback, useEffect, useState } from "react";
import { go, useLanguage, useRoute, useSelect, useSession, WordsContext } from "./hooks";
import { NEW, type Session } from "./lib/session";
import { NO_DRAFT, settingsOf } from "./lib/store";
import { Composer, useRunning } from "./ui/Composer";
import { Dialogs } from "./ui/Dialogs";
import { DropZone } from "./ui/DropZone";
import { KeyDialog } from "./ui/KeyDialog";
import { focusInput } from "./ui/Palette";
import { Panel } from "./ui/Panel";
import { Sidebar } from "./ui/Sidebar";
import { Thread } from "./ui/Thread";
import { Toast } from "./ui/Toast";
import { TopBar } from "./ui/TopBar";
import { Welcome } from "./ui/Welcome";

const NARROW = "(max-width: 760px)";

export function App() {
  const words = useLanguage();
  const session = useSession();
  const chat = useRoute();
  // Not the thread itself: it changes with every frame of an answer, and the page around it does not.
  const title = useSelect((s) => (chat === null ? undefined : s.threads[chat]?.info.title));
  const panel = useSelect((s) => s.panel !== null) && chat !== null;
  const docked = useSelect((s) => s.prefs.sidebar);
  const [drawer, setDrawer] = useState(false);
  useTheme();
  useOpen(session, chat, words.t("chat.missing"));
  useEffect(() => {
    document.title = title ? `${title} · rorqual` : "rorqual";
  }, [title]);
  useEffect(() => {
    setDrawer(false);
    session.store.update((s) => (s.panel || s.editing ? { ...s, panel: null, editing: null } : s));
  }, [chat, session]);

  const closeDrawer = useCallback(() => setDrawer(false), []);
  const toggleSidebar = useCallback(() => {
    if (matchMedia(NARROW).matches) setDrawer((open) => !open);
    else session.prefs({ sidebar: !session.store.get().prefs.sidebar });
  }, [session]);
  useShortcuts(session, chat, { drawer, closeDrawer, toggleSidebar });
  const ask = useCallback((text: string) => {
    const { files } = session.store.get().drafts[chat ?? NEW] ?? NO_DRAFT;
    const id = session.ask(chat, text, files.flatMap((f) => f.info ?? []));
    if (id !== chat) go(id);
  }, [session, chat]);

  return (
    <WordsContext value={words}>
      <div className={`app${docked ? " docked" : ""}${drawer ? " drawer" : ""}${panel ? " split" : ""}`}>
        <Sidebar chat={chat} onToggle={toggleSidebar} onPick={closeDrawer} />
        <div className="scrim" onClick={() => setDrawer(false)} aria-hidden="true" />
        <main className={chat === null ? "main fresh" : "main"} inert={drawer}>
          <TopBar chat={chat} onToggleSidebar={toggleSidebar} />
          {chat === null ? <Welcome onAsk={ask} /> : title !== undefined ? <Thread key={chat} chat={chat} /> : <div className="thread" aria-busy="true" />}
          <Composer chat={chat} onAsk={ask} />
        </main>
        {chat !== null && <Panel chat={chat} />}
        <DropZone place={chat ?? NEW} />
        <KeyDialog chat={chat} />
        <Dialogs chat={chat} />
        <Toast />
      </div>
    </WordsContext>
  );
}

function useTheme(): void {
  const theme = useSelect((s) => s.prefs.theme);
  useEffect(() => {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
  }, [theme]);
}

/** Gets the chat that the address names, again when the page comes back after a while; leaves one that is not there. */
function useOpen(session: Session, chat: string | null, missing: string): void {
  const known = useSelect((s) => s.setup !== null);
  useEffect(() => {
    if (!known) return;
    const open = async (id: string) => {
      if ((await session.open(id)) || location.hash !== `#/c/${id}`) return;
      go(null);
      session.store.set({ toast: { text: missing } });
    };
    if (chat !== null && !session.store.get().threads[chat]) void open(chat);
    const back = () => {
      if (document.hidden) return;
      void session.refreshList();
      if (chat !== null && !session.unsent(chat)) void open(chat);
    };
    document.addEventListener("visibilitychange", back);
    return () => document.removeEventListener("visibilitychange", back);
  }, [session, chat, known]);
}

interface Around {
  drawer: boolean;
  closeDrawer: () => void;
  toggleSidebar: () => void;
}

function useShortcuts(session: Session, chat: string | null, around: Around): void {
  const running = useRunning(chat);
  useEffect(() => {
    const keydown = (event: KeyboardEvent) => {
      if (event.defaultPrevented || event.isComposing) return;
      const mod = event.ctrlKey || event.metaKey;
      const stroke = `${mod ? "mod+" : ""}${event.altKey ? "alt+" : ""}${event.shiftKey ? "shift+" : ""}${event.code}`;
      const work = strokes(session, chat, running, around)[stroke];
      if (!work) return;
      event.preventDefault();
      work();
    };
    document.addEventListener("keydown", keydown);
    return () => document.removeEventListener("keydown", keydown);
  });
}

function strokes(session: Session, chat: string | null, running: string | null, around: Around): Record<string, (() => void) | undefined> {
  const { setup, dialog, panel } = session.store.get();
  const settings = settingsOf(session.store.get(), chat);
  const thinks = setup?.models.find((m) => m.id === settings.model)?.thinking;
  const escape = () => {
    if (document.querySelector("[role=menu], [role=dialog]")) return; // theirs to close
    if (around.drawer) around.closeDrawer();
    else if (running !== null && chat !== null) void session.stop(chat, running);
    else if (panel) session.show(null);
  };
  return {
    "mod+KeyK": () => session.store.set({ dialog: dialog === "palette" ? null : "palette" }),
    "mod+shift+KeyO": () => go(null),
    "mod+shift+KeyS": around.toggleSidebar,
    "mod+Slash": () => session.store.set({ dialog: dialog === "keys" ? null : "keys" }),
    "shift+Escape": focusInput,
    "alt+KeyT": thinks ? () => session.settings(chat, { thinking: !settings.thinking }) : undefined,
    "alt+KeyS": setup?.search.available ? () => session.settings(chat, { search: !settings.search }) : undefined,
    Escape: escape,
  };
}
