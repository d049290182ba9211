import { type SubmitEvent, useEffect, useRef, useState } from "react";
import { useSelect, useSession } from "../hooks";

/** Asks for the API key that the server wants. */
export function KeyDialog({ chatId }: { chatId: string | null }) {
  const session = useSession();
  const open = useSelect((s) => s.askKey);
  const refused = useSelect((s) => s.key !== null);
  const dialog = useRef<HTMLDialogElement>(null);
  const [key, setKey] = useState("");

  useEffect(() => {
    if (open) dialog.current?.showModal();
    else dialog.current?.close();
  }, [open]);

  const close = () => session.store.dispatch({ type: "set", values: { askKey: false } });
  const submit = (event: SubmitEvent) => {
    event.preventDefault();
    if (!key.trim()) return;
    setKey("");
    void session.useKey(key.trim(), chatId);
  };
  return (
    <dialog ref={dialog} className="key-dialog" aria-labelledby="key-title" onClose={close} data-testid="key-dialog">
      <form onSubmit={submit}>
        <h2 id="key-title">This server asks for an API key</h2>
        <p>
          {refused ? "It did not accept the key given before. " : ""}
          The key is kept in this browser and sent to this server only.
        </p>
        <label htmlFor="key">API key</label>
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
            Cancel
          </button>
          <button className="button primary" disabled={!key.trim()} data-testid="key-save">
            Save
          </button>
        </div>
      </form>
    </dialog>
  );
}
