import { useState } from "react";
import { useSelect, useSession } from "../hooks";
import { currentModel } from "../lib/store";
import type { Settings } from "../lib/types";

export function SettingsPopover({ chatId }: { chatId: string | null }) {
  const session = useSession();
  const { temperature, maxTokens, system } = useSelect((s) => s.settings);
  const limit = useSelect((s) => currentModel(s)?.max_model_len);
  const key = useSelect((s) => s.key);
  const set = (settings: Partial<Settings>) => session.store.dispatch({ type: "settings", settings });
  return (
    <div id="settings" popover="auto" className="settings" role="dialog" aria-label="Settings" data-testid="settings">
      <div className="field">
        <label htmlFor="temperature">Temperature</label>
        <output htmlFor="temperature">{temperature === null ? "default" : temperature.toFixed(1)}</output>
        <input
          id="temperature"
          type="range"
          min="0"
          max="2"
          step="0.1"
          value={temperature ?? 1}
          onChange={(event) => set({ temperature: Number(event.target.value) })}
          data-testid="temperature"
        />
        <p>
          Low repeats itself, high surprises.
          {temperature !== null && (
            <button className="link" onClick={() => set({ temperature: null })}>
              Reset
            </button>
          )}
        </p>
      </div>
      <div className="field">
        <label htmlFor="max-tokens">Most tokens in an answer</label>
        <TokenInput value={maxTokens} limit={limit} onChange={(value) => set({ maxTokens: value })} />
      </div>
      <div className="field">
        <label htmlFor="system">System prompt</label>
        <textarea
          id="system"
          rows={4}
          value={system}
          placeholder="For example: Answer in one sentence."
          onChange={(event) => set({ system: event.target.value })}
          data-testid="system"
        />
      </div>
      {key && (
        <button className="button" onClick={() => void session.useKey(null, chatId)} data-testid="forget-key">
          Forget the API key
        </button>
      )}
    </div>
  );
}

/** Keeps what is being typed; hands on only whole positive numbers, or null for the default. */
function TokenInput({ value, limit, onChange }: { value: number | null; limit: number | undefined; onChange: (value: number | null) => void }) {
  const [text, setText] = useState(value === null ? "" : String(value));
  return (
    <input
      id="max-tokens"
      type="number"
      min="1"
      max={limit}
      step="1"
      inputMode="numeric"
      value={text}
      placeholder={limit ? `default (the model holds ${limit.toLocaleString("en")})` : "default"}
      onChange={(event) => {
        const number = event.target.valueAsNumber;
        setText(event.target.value);
        onChange(Number.isInteger(number) && number > 0 ? number : null);
      }}
      data-testid="max-tokens"
    />
  );
}
