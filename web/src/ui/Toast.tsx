import { useEffect } from "react";
import { useSelect, useSession } from "../hooks";

const SHOWN_MS = 8000;

/** Something to know for a moment; after a deletion, the way back. */
export function Toast() {
  const session = useSession();
  const toast = useSelect((s) => s.toast);
  useEffect(() => {
    if (!toast) return;
    const timer = setTimeout(() => session.store.set({ toast: null }), SHOWN_MS);
    return () => clearTimeout(timer);
  }, [toast, session]);
  const act = () => {
    session.store.set({ toast: null });
    toast?.action?.run();
  };
  return (
    <div role="status" className="toasts">
      {toast && (
        <div className="toast" data-testid="toast">
          <span>{toast.text}</span>
          {toast.action && (
            <button type="button" className="link" onClick={act} data-testid="undo">
              {toast.action.label}
            </button>
          )}
        </div>
      )}
    </div>
  );
}
