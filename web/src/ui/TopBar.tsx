import { memo, useState } from "react";
import { routeTo, useSelect, useSession, useT } from "../hooks";
import { short } from "../lib/i18n";
import { settingsOf } from "../lib/store";
import { IconButton, Menu, MenuChoice, MenuOf } from "./bits";
import { ChatActions, Naming } from "./ChatRow";
import { Icon } from "./icons";
import { Parameters } from "./Parameters";

export const TopBar = memo(function TopBar({ chat, onToggleSidebar }: { chat: string | null; onToggleSidebar: () => void }) {
  const t = useT();
  const info = useSelect((s) => (chat === null ? undefined : s.threads[chat]?.info));
  const [naming, setNaming] = useState(false);
  return (
    <header className="header">
      <IconButton icon="panel" className="side-toggle" label={t("side.show")} onClick={onToggleSidebar} testId="menu" />
      <ModelPicker chat={chat} />
      {info && naming ? (
        <Naming id={info.id} title={info.title} className="title" onClose={() => setNaming(false)} />
      ) : (
        info && (
          <h1 className="title" title={info.title}>
            {info.title}
          </h1>
        )
      )}
      {!info && <span className="grow" />}
      <Parameters key={chat} chat={chat} />
      {info && (
        <MenuOf label={t("chat.options")} trigger={<IconButton icon="more" label={t("chat.options")} testId="thread-menu" />}>
          <ChatActions id={info.id} pinned={info.pinned} current onRename={() => setNaming(true)} />
        </MenuOf>
      )}
      {chat !== null && (
        <a className="icon-button new" href={routeTo(null)} aria-label={t("side.new")} title={t("side.new")}>
          <Icon name="pencil" />
        </a>
      )}
    </header>
  );
});

/** A choice where there is one; otherwise the name. */
function ModelPicker({ chat }: { chat: string | null }) {
  const t = useT();
  const session = useSession();
  const models = useSelect((s) => s.setup?.models);
  const model = useSelect((s) => settingsOf(s, chat).model);
  if (!models || !model) return <span className="model" />;
  if (models.length === 1) return <span className="model" data-testid="model">{model}</span>;
  const trigger = (
    <button type="button" className="model picker" aria-label={`${t("settings.model")}: ${model}`} data-testid="model">
      <span>{model}</span>
      <Icon name="chevron" size={16} />
    </button>
  );
  return (
    <MenuOf trigger={trigger} align="start" label={t("settings.model")}>
      <Menu.RadioGroup value={model} onValueChange={(id) => session.settings(chat, { model: String(id) })}>
        {models.map((m) => (
          <MenuChoice
            key={m.id}
            value={m.id}
            testId="model-choice"
            note={[t("settings.context", { n: 0 }).replace("0", short(m.context_length)), (m.thinking || m.thinking_mode === "always") && t("settings.thinks")].filter(Boolean).join(" · ")}
          >
            {m.id}
          </MenuChoice>
        ))}
      </Menu.RadioGroup>
    </MenuOf>
  );
}
