import { Popover } from "@base-ui/react/popover";
import { useMemo } from "react";
import { useSelect, useSession, useT } from "../hooks";
import { costOf, dollars, totalsOf } from "../lib/cost";
import { short } from "../lib/i18n";
import type { Price } from "../lib/types";
import { Icon } from "./icons";

/** Under the composer: what the conversation has used, how fast it is, and what it would cost. */
export function CostLine({ chat }: { chat: string | null }) {
  const t = useT();
  const messages = useSelect((s) => (chat === null ? undefined : s.threads[chat]?.messages));
  const path = useSelect((s) => (chat === null ? undefined : s.threads[chat]?.path));
  const prices = useSelect((s) => s.setup?.prices);
  const chosen = useSelect((s) => s.prefs.price);
  const totals = useMemo(() => (messages ? totalsOf(messages) : null), [messages]);
  if (!messages || !totals || totals.prompt + totals.completion === 0) return <p className="caution">{t("app.caution")}</p>;
  const price = prices?.find((p) => p.name === chosen) ?? prices?.[0];
  const last = path?.findLast((id) => typeof messages.get(id)?.usage?.tokens_per_s === "number");
  const speed = messages.get(last ?? "")?.usage?.tokens_per_s;
  const percent = totals.prompt ? `${Math.round((100 * totals.cached) / totals.prompt)}%` : "0%";
  const parts = [
    t("cost.tokens", { input: short(totals.prompt), output: short(totals.completion) }),
    t("cost.cached", { percent }),
    speed && t("cost.speed", { n: speed < 10 ? Math.round(speed * 10) / 10 : Math.round(speed) }),
  ].filter((part) => typeof part === "string");
  return (
    <div className="cost" data-testid="cost" role="group" aria-label={t("cost.label")}>
      {parts.map((part, index) => (
        <span key={index}>{part}</span>
      ))}
      {price && (
        <Popover.Root>
          <Popover.Trigger className="cost-price" data-testid="cost-price">
            {t("cost.at", { cost: dollars(costOf(totals, price)), name: price.name })}
            <Icon name="chevron" size={14} />
          </Popover.Trigger>
          <Popover.Portal>
            <Popover.Positioner className="layer" side="top" align="end" sideOffset={6} collisionPadding={8}>
              <Popover.Popup className="popup prices" aria-label={t("cost.choose")}>
                <p>{t("cost.note")}</p>
                <Prices prices={prices ?? []} current={price} cost={(p) => dollars(costOf(totals, p))} />
              </Popover.Popup>
            </Popover.Positioner>
          </Popover.Portal>
        </Popover.Root>
      )}
    </div>
  );
}

function Prices({ prices, current, cost }: { prices: Price[]; current: Price; cost: (price: Price) => string }) {
  const t = useT();
  const session = useSession();
  return (
    <ul>
      {prices.map((price) => (
        <li key={price.name}>
          <button type="button" aria-pressed={price.name === current.name} onClick={() => session.prefs({ price: price.name })} data-testid="price">
            <span>
              {price.name}
              <small>{t("cost.row", { miss: String(price.input_miss), hit: String(price.input_hit), output: String(price.output) })}</small>
            </span>
            <strong>{cost(price)}</strong>
          </button>
        </li>
      ))}
    </ul>
  );
}
