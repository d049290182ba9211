import { useRef } from "react";
import { go, useSelect, useSession, useWords } from "../hooks";
import { type Language, LANGUAGES } from "../lib/i18n";
import type { Prefs } from "../lib/store";
import { Menu, MenuChoice, MenuItem, MenuOf } from "./bits";
import { Icon } from "./icons";

export const THEMES = ["system", "light", "dark"] as const;

/** At the foot of the sidebar: what concerns the page rather than a conversation. */
export function SettingsMenu() {
  const { t, language } = useWords();
  const session = useSession();
  const theme = useSelect((s) => s.prefs.theme);
  const key = useSelect((s) => s.key);
  const input = useRef<HTMLInputElement>(null);
  const trigger = (
    <button type="button" className="side-foot" data-testid="settings-button">
      <Icon name="nut" />
      {t("settings.title")}
    </button>
  );
  return (
    <>
      <MenuOf trigger={trigger} align="start" side="top" label={t("settings.title")}>
        <Menu.RadioGroup value={theme ?? "system"} onValueChange={(value) => session.prefs({ theme: themeOf(value) })}>
          <Menu.GroupLabel className="menu-label">{t("settings.theme")}</Menu.GroupLabel>
          {THEMES.map((name) => (
            <MenuChoice key={name} value={name} testId={`theme-${name}`}>
              {t(`settings.theme.${name}`)}
            </MenuChoice>
          ))}
        </Menu.RadioGroup>
        <Menu.Separator className="menu-line" />
        <Menu.RadioGroup value={language} onValueChange={(value) => session.prefs({ language: value as Language })}>
          <Menu.GroupLabel className="menu-label">{t("settings.language")}</Menu.GroupLabel>
          {Object.entries(LANGUAGES).map(([code, { name }]) => (
            <MenuChoice key={code} value={code} testId={`language-${code}`}>
              {name}
            </MenuChoice>
          ))}
        </Menu.RadioGroup>
        <Menu.Separator className="menu-line" />
        <MenuItem icon="upload" onClick={() => input.current?.click()} testId="import">
          {t("chat.import")}
        </MenuItem>
        <MenuItem icon="keys" onClick={() => session.store.set({ dialog: "keys" })} testId="shortcuts">
          {t("keys.title")}
        </MenuItem>
        {key !== null && (
          <MenuItem icon="key" onClick={() => void session.useKey(null, null)} testId="forget-key">
            {t("settings.forgetKey")}
          </MenuItem>
        )}
      </MenuOf>
      <input
        ref={input}
        type="file"
        accept=".json,application/json"
        hidden
        onChange={async (event) => {
          const file = event.target.files?.[0];
          event.target.value = "";
          const exported = file && (await parsed(file));
          if (exported === null) session.store.set({ toast: { text: t("chat.badFile") } });
          const id = exported ? await session.import(exported) : null;
          if (!id) return;
          session.store.set({ toast: { text: t("chat.imported") } });
          go(id);
        }}
        data-testid="import-input"
      />
    </>
  );
}

async function parsed(file: File): Promise<unknown> {
  try {
    return JSON.parse(await file.text());
  } catch {
    return null;
  }
}

export const themeOf = (name: unknown): Prefs["theme"] => (name === "light" || name === "dark" ? name : null);
