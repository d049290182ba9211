import { Component, type ReactNode } from "react";
import { createRoot } from "react-dom/client";
import { App } from "./App";
import { SessionContext } from "./hooks";
import { persist } from "./lib/persist";
import { Session } from "./lib/session";
import { browserDisk, load } from "./lib/storage";
import { createStore } from "./lib/store";
import "./styles/base.css";
import "./styles/layout.css";
import "./styles/thread.css";
import "./styles/markdown.css";
import "./styles/composer.css";
import "./styles/controls.css";

/** A fault in drawing must not leave an empty page. */
class Boundary extends Component<{ children: ReactNode }, { fault: string | null }> {
  override state = { fault: null };
  static getDerivedStateFromError = (error: unknown) => ({ fault: String(error) });
  override render() {
    if (this.state.fault === null) return this.props.children;
    return (
      <main className="crash" role="alert">
        <h1>The page has stumbled</h1>
        <p>{this.state.fault}</p>
        <button className="button primary" onClick={() => location.reload()}>
          Reload
        </button>
      </main>
    );
  }
}

const disk = browserDisk();
const store = createStore(load(disk));
const session = new Session(store);
persist(store, disk);
void session.loadModels();

createRoot(document.getElementById("root") as HTMLElement).render(
  <Boundary>
    <SessionContext value={session}>
      <App />
    </SessionContext>
  </Boundary>,
);
