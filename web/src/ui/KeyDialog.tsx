import { type SubmitEvent, useState } from "react";
import { useSelect, useSession, useT } from "../hooks";
import { Modal } from "./Dialogs";

/** Asks for the API key that the server wants. */
export function KeyDialog({ chat }: { chat: string | null }) {
  const t = useT();
  const session = useSession();
  const open = useSelect((s) => s.askKey);
  const refused = useSelect((s) => s.key !== null);
  const [key, setKey] = useState("");
  const close = () => session.store.set({ askKey: false });
  const submit = (event: SubmitEvent) => {
    event.preventDefault();
    if (!key.trim()) return;
    setKey("");
    void session.useKey(key.trim(), chat);
  };
  return (
    <Modal open={open} onClose={close} title={t("key.title")} className="key-dialog" testId="key-dialog">
      <form onSubmit={submit}>
        <p>
          {refused ? `${t("key.refused")} ` : ""}
          {t("key.text")}
        </p>
        <label htmlFor="key">{t("key.label")}</label>
        <input
          id="key"
          type="password"
          autoComplete="off"
          spellCheck={false}
          value={key}
          placeholder="sk-…"
          onChange={(event) => setKey(event.target.value)}
          data-testid="key-input"
        />
        <div>
          <button type="button" className="button" onClick={close}>
            {t("key.cancel")}
          </button>
          <button className="button primary" disabled={!key.trim()} data-testid="key-save">
            {t("key.save")}
          </button>
        </div>
      </form>
    </Modal>
  );
}
