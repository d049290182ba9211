import { type ReactNode, useEffect, useRef } from "react";
import { useMessage, useSelect, useSession, useT } from "../hooks";
import { IconButton } from "./bits";
import { Preview } from "./Preview";
import { Sources } from "./Sources";

/** What is open beside the conversation (over it on a narrow screen). */
export function Panel({ chat }: { chat: string }) {
  const panel = useSelect((s) => s.panel);
  if (!panel) return null;
  if (panel.kind === "preview") return <Preview key={panel.code} language={panel.language} code={panel.code} />;
  return <SourcesOf key={panel.message} chat={chat} message={panel.message} n={panel.n} />;
}

function SourcesOf({ chat, message, n }: { chat: string; message: string; n: number | null }) {
  const found = useMessage(chat, message);
  return found?.search ? <Sources message={found} search={found.search} n={n} /> : null;
}

/** The frame of a panel: takes the focus when it opens, gives it back when it closes. */
export function PanelFrame({ title, tools, children, testId }: { title: string; tools?: ReactNode; children: ReactNode; testId: string }) {
  const t = useT();
  const session = useSession();
  const box = useRef<HTMLElement>(null);
  useEffect(() => {
    const before = document.activeElement;
    box.current?.focus({ preventScroll: true });
    return () => {
      if (before instanceof HTMLElement && before.isConnected) before.focus({ preventScroll: true });
    };
  }, []);
  return (
    <aside className="panel" aria-label={title} tabIndex={-1} ref={box} data-testid={testId}>
      <header>
        <h2>{title}</h2>
        <span className="grow" />
        {tools}
        <IconButton icon="close" label={t("panel.close")} onClick={() => session.show(null)} testId="panel-close" />
      </header>
      {children}
    </aside>
  );
}
