import { useSelect, useSession, routeTo } from "../hooks";
import { currentModel } from "../lib/store";
import { Icon } from "./icons";
import { SettingsPopover } from "./SettingsPopover";

export function Header({ chatId, onToggleSidebar }: { chatId: string | null; onToggleSidebar: () => void }) {
  return (
    <header className="header">
      <button className="icon-button menu" onClick={onToggleSidebar} aria-label="Show chats" title="Show chats" data-testid="menu">
        <Icon name="panel" />
      </button>
      <ModelPicker />
      <span className="grow" />
      {chatId !== null && (
        <a className="icon-button new" href={routeTo(null)} aria-label="New chat" title="New chat">
          <Icon name="plus" />
        </a>
      )}
      <ThemeButton />
      <button
        className="icon-button"
        popoverTarget="settings"
        aria-label="Settings"
        title="Settings"
        data-testid="settings-button"
      >
        <Icon name="gear" />
      </button>
      <SettingsPopover chatId={chatId} />
    </header>
  );
}

/** A choice where there is one; otherwise the name. */
function ModelPicker() {
  const session = useSession();
  const models = useSelect((s) => s.models);
  const model = useSelect(currentModel);
  if (!model) return null;
  if (models.length === 1) return <span className="model" data-testid="model">{model.id}</span>;
  return (
    <label className="model picker">
      <span className="offscreen">Model</span>
      <select
        value={model.id}
        onChange={(event) => session.store.dispatch({ type: "settings", settings: { model: event.target.value } })}
        data-testid="model"
      >
        {models.map(({ id }) => (
          <option key={id}>{id}</option>
        ))}
      </select>
      <Icon name="chevron" size={16} />
    </label>
  );
}

/** Light or dark. Choosing what the system has anyway goes back to following it. */
function ThemeButton() {
  const session = useSession();
  const theme = useSelect((s) => s.settings.theme);
  const toggle = () => {
    const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    const next = (theme ?? system) === "dark" ? "light" : "dark";
    session.store.dispatch({ type: "settings", settings: { theme: next === system ? null : next } });
  };
  return (
    <button className="icon-button theme" onClick={toggle} aria-label="Switch between light and dark" title="Light or dark" data-testid="theme">
      <Icon name="moon" />
      <Icon name="sun" />
    </button>
  );
}
