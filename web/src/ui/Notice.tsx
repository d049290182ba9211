import { useSelect, useSession, useT } from "../hooks";
import { Icon } from "./icons";

/** What stands in the way of a chat, above the place where one would start it. */
export function Notice() {
  const t = useT();
  const session = useSession();
  const fault = useSelect((s) => s.fault);
  const offline = useSelect((s) => s.offline);
  if (!fault && !offline) return null;
  if (!fault) {
    return (
      <div className="fault soft" role="status" data-testid="notice">
        <Icon name="warn" />
        <p>{t("ask.offline")}</p>
      </div>
    );
  }
  const key = fault.status === 401;
  return (
    <div className="fault" role="alert" data-testid="notice">
      <Icon name="warn" />
      <p>{fault.message || t("ask.unreachable")}</p>
      <button type="button" className="button" onClick={() => (key ? session.store.set({ askKey: true }) : void session.start())}>
        {key ? t("ask.key") : t("ask.retry")}
      </button>
    </div>
  );
}
