import { useEffect, useState } from "react";
import { go, useRoute, useSelect, useSession } from "./hooks";
import { Composer } from "./ui/Composer";
import { Header } from "./ui/Header";
import { KeyDialog } from "./ui/KeyDialog";
import { Sidebar } from "./ui/Sidebar";
import { Thread } from "./ui/Thread";
import { Toast } from "./ui/Toast";
import { Welcome } from "./ui/Welcome";

const NARROW = "(max-width: 760px)";

export function App() {
  const session = useSession();
  const chatId = useRoute();
  const chat = useSelect((s) => (chatId === null ? undefined : s.chats[chatId]));
  const theme = useSelect((s) => s.settings.theme);
  const docked = useSelect((s) => s.settings.sidebar);
  const [drawer, setDrawer] = useState(false);
  const last = chat?.messages.at(-1);
  const busy = last?.role === "assistant" && last.status === "streaming";

  useEffect(() => {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
  }, [theme]);

  useEffect(() => {
    document.title = chat ? `${chat.title} · rorqual` : "rorqual";
    setDrawer(false);
    if (chatId !== null && !chat) go(null); // deleted, or from another browser
  }, [chatId, chat?.title]);

  useEffect(() => {
    const keydown = (event: KeyboardEvent) => {
      if (event.key !== "Escape" || event.defaultPrevented) return;
      if (document.querySelector("dialog[open], :popover-open")) return; // theirs to close
      if (drawer) setDrawer(false);
      else if (busy && chatId) session.stop(chatId);
    };
    document.addEventListener("keydown", keydown);
    return () => document.removeEventListener("keydown", keydown);
  }, [busy, chatId, drawer, session]);

  const toggleSidebar = () => {
    if (matchMedia(NARROW).matches) setDrawer(!drawer);
    else session.store.dispatch({ type: "settings", settings: { sidebar: !docked } });
  };
  const ask = (text: string) => {
    const id = session.ask(chat ? chat.id : null, text);
    if (id !== chatId) go(id);
  };

  return (
    <div className={`app${docked ? " docked" : ""}${drawer ? " drawer" : ""}`}>
      <Sidebar chatId={chatId} onToggle={toggleSidebar} />
      <div className="scrim" onClick={() => setDrawer(false)} aria-hidden="true" />
      <main className={chat ? "main" : "main fresh"} inert={drawer}>
        <Header chatId={chatId} onToggleSidebar={toggleSidebar} />
        {chat ? <Thread key={chat.id} chat={chat} busy={busy} /> : <Welcome onAsk={ask} />}
        <Composer chatId={chatId} busy={busy} onAsk={ask} />
      </main>
      <KeyDialog chatId={chatId} />
      <Toast />
    </div>
  );
}
