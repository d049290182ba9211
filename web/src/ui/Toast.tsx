import { useEffect } from "react";
import { useSelect, useSession } from "../hooks";

const SHOWN_MS = 7000;

/** After a deletion, for a while: the way back. */
export function Toast() {
  const session = useSession();
  const deleted = useSelect((s) => s.deleted);
  useEffect(() => {
    if (!deleted) return;
    const timer = setTimeout(() => session.store.dispatch({ type: "set", values: { deleted: null } }), SHOWN_MS);
    return () => clearTimeout(timer);
  }, [deleted, session]);
  return (
    <div role="status">
      {deleted && (
        <div className="toast" data-testid="toast">
          Chat deleted
          <button className="link" onClick={() => session.restore(deleted)} data-testid="undo">
            Undo
          </button>
        </div>
      )}
    </div>
  );
}
