import { Component, type ReactNode } from "react";
import { createRoot } from "react-dom/client";
import { App } from "./App";
import { SessionContext } from "./hooks";
import { languageOf, translator } from "./lib/i18n";
import { browserDisk, keep, load } from "./lib/local";
import { Session } from "./lib/session";
import { createStore } from "./lib/store";
import "@fontsource-variable/inter/wght.css";
import "./styles/base.css";
import "./styles/layout.css";
import "./styles/thread.css";
import "./styles/markdown.css";
import "./styles/composer.css";
import "./styles/controls.css";
import "./styles/panel.css";
import "./styles/code.css";

/** A fault in drawing must not leave an empty page. */
class Boundary extends Component<{ children: ReactNode }, { fault: string | null }> {
  override state = { fault: null };
  static getDerivedStateFromError = (error: unknown) => ({ fault: String(error) });
  override render() {
    if (this.state.fault === null) return this.props.children;
    const t = translator(languageOf(null, navigator.languages));
    return (
      <main className="crash" role="alert">
        <h1>{t("app.crash")}</h1>
        <p>{this.state.fault}</p>
        <button className="button primary" onClick={() => location.reload()}>
          {t("app.reload")}
        </button>
      </main>
    );
  }
}

const disk = browserDisk();
const store = createStore(load(disk));
const session = new Session(store);
window.addEventListener("pagehide", () => session.rescue());
keep(store, disk);
void session.start();

createRoot(document.getElementById("root") as HTMLElement).render(
  <Boundary>
    <SessionContext value={session}>
      <App />
    </SessionContext>
  </Boundary>,
);
