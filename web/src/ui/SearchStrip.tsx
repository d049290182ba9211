import { useSession, useT } from "../hooks";
import type { Translate } from "../lib/i18n";
import { type Message, type Phase, phaseOf, type Search } from "../lib/types";
import { SiteMark } from "./Citation";
import { Icon } from "./icons";

const MARKS = 4;

/** Where the search stands; when it is through, the way to its sources. */
export function SearchStrip({ message, search }: { message: Message; search: Search }) {
  const t = useT();
  const session = useSession();
  const phase = phaseOf(message);
  const searching = phase !== "done";
  const open = () => session.show({ kind: "sources", message: message.id, n: null });
  return (
    <section className="search-strip" data-testid="search" data-phase={phase}>
      <div className={searching ? "search-state busy" : "search-state"}>
        {searching || !search.sources.length ? (
          <span className="search-words">
            <Icon name={search.failed ? "warn" : "globe"} size={16} />
            {words(t, phase, search)}
          </span>
        ) : (
          <button type="button" className="fold" onClick={open} title={t("search.open")} data-testid="open-sources">
            <Icon name="globe" size={16} />
            {words(t, phase, search)}
            <span className="marks" aria-hidden="true">
              {search.sources.slice(0, MARKS).map((source) => (
                <SiteMark key={source.n} site={source.site} />
              ))}
            </span>
            <Icon name="right" size={14} />
          </button>
        )}
      </div>
      {search.queries.length > 0 && (
        <ul className="queries" data-testid="queries">
          {search.queries.map((query) => (
            <li key={query}>
              <Icon name="search" size={14} />
              {query}
            </li>
          ))}
        </ul>
      )}
    </section>
  );
}

function words(t: Translate, phase: Phase, search: Search): string {
  if (search.failed) return t("search.failed", { reason: search.failed });
  const n = search.sources.length;
  if (phase === "done") return n ? t("search.done", { n }) : t("search.none");
  if (phase === "reading") return t("search.reading", { n });
  return t(phase === "fetching" ? "search.fetching" : "search.queries");
}
