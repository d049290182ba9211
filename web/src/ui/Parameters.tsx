import { Popover } from "@base-ui/react/popover";
import { useSelect, useSession, useSettings, useT } from "../hooks";
import type { Settings } from "../lib/types";
import { IconButton } from "./bits";

/** System prompt and sampling of one conversation; without one, of the next. */
export function Parameters({ chat }: { chat: string | null }) {
  const t = useT();
  return (
    <Popover.Root>
      <Popover.Trigger render={<IconButton icon="gear" label={t("settings.chat")} testId="parameters-button" />} />
      <Popover.Portal>
        <Popover.Positioner className="layer" align="end" sideOffset={6} collisionPadding={8}>
          <Popover.Popup className="popup parameters" data-testid="parameters">
            <Popover.Title className="popup-title">{t("settings.chat")}</Popover.Title>
            {chat === null && <p className="hint">{t("settings.fresh")}</p>}
            <Fields chat={chat} />
          </Popover.Popup>
        </Popover.Positioner>
      </Popover.Portal>
    </Popover.Root>
  );
}

function Fields({ chat }: { chat: string | null }) {
  const t = useT();
  const session = useSession();
  const values = useSettings(chat);
  const limit = useSelect((s) => s.setup?.models.find((m) => m.id === values.model)?.max_output);
  const set = (news: Partial<Settings>) => session.settings(chat, news);
  return (
    <>
      <div className="field">
        <label htmlFor="system">{t("settings.system")}</label>
        <textarea
          id="system"
          rows={4}
          value={values.system}
          placeholder={t("settings.system.hint")}
          onChange={(event) => set({ system: event.target.value })}
          data-testid="system"
        />
      </div>
      <Slider id="temperature" name={t("settings.temperature")} hint={t("settings.temperature.hint")} max={2} value={values.temperature} onChange={(temperature) => set({ temperature })} />
      <Slider id="top_p" name={t("settings.top_p")} max={1} min={0.05} value={values.top_p} onChange={(top_p) => set({ top_p })} />
      <div className="field">
        <label htmlFor="max-tokens">{t("settings.max_tokens")}</label>
        <input
          id="max-tokens"
          type="number"
          min={1}
          max={limit}
          inputMode="numeric"
          defaultValue={values.max_tokens ?? ""}
          placeholder={t("settings.default")}
          onChange={({ target: { valueAsNumber: n } }) => set({ max_tokens: Number.isInteger(n) && n > 0 ? n : null })}
          data-testid="max-tokens"
        />
      </div>
    </>
  );
}

interface SliderProps {
  id: string;
  name: string;
  hint?: string;
  min?: number;
  max: number;
  value: number | null;
  onChange: (value: number | null) => void;
}

function Slider({ id, name, hint, min = 0, max, value, onChange }: SliderProps) {
  const t = useT();
  return (
    <div className="field">
      <label htmlFor={id}>{name}</label>
      {value === null ? (
        <output htmlFor={id}>{t("settings.default")}</output>
      ) : (
        <span className="set">
          <output htmlFor={id}>{value}</output>
          <button type="button" className="link" onClick={() => onChange(null)}>
            {t("settings.reset")}
          </button>
        </span>
      )}
      <input id={id} type="range" min={min} max={max} step={0.05} value={value ?? 1} onChange={(event) => onChange(Number(event.target.value))} data-testid={id} />
      {hint && <p>{hint}</p>}
    </div>
  );
}
