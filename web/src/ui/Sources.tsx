import { useEffect, useMemo, useRef } from "react";
import { useT } from "../hooks";
import { plain } from "../lib/prepare";
import type { Check, Message, Search, Source } from "../lib/types";
import { SiteMark } from "./Citation";
import { Icon } from "./icons";
import { PanelFrame } from "./Panel";

/** The drawer: every source with the passage that the model was shown, and the sentences that cite it. */
export function Sources({ message, search, n }: { message: Message; search: Search; n: number | null }) {
  const t = useT();
  const list = useRef<HTMLOListElement>(null);
  useEffect(() => {
    if (n !== null) list.current?.querySelector(`[data-n="${n}"]`)?.scrollIntoView({ block: "nearest" });
  }, [n]);
  const checks = message.checks ?? [];
  const found = checks.filter((c) => c.found).length;
  return (
    <PanelFrame title={t("search.sources")} testId="sources">
      <div className="panel-body" tabIndex={0} role="group" aria-label={t("search.sources")}>
        {search.queries.length > 0 && (
          <ul className="queries">
            {search.queries.map((query) => (
              <li key={query}>
                <Icon name="search" size={14} />
                {query}
              </li>
            ))}
          </ul>
        )}
        {checks.length > 0 && (
          <p className="verdicts" data-testid="verdicts">
            <strong>{t("search.verdict", { n: found, all: checks.length })}</strong> {t("search.help")}
          </p>
        )}
        <ol className="sources" ref={list}>
          {search.sources.map((source) => (
            <Item key={source.n} source={source} message={message} checks={checks} current={source.n === n} />
          ))}
        </ol>
        {(search.problems ?? []).map(({ where, message: problem }) => (
          <p key={where} className="problem">
            {where}: {problem}
          </p>
        ))}
      </div>
    </PanelFrame>
  );
}

const isWeb = (url: string) => /^https?:\/\//i.test(url);

function Item({ source, message, checks, current }: { source: Source; message: Message; checks: Check[]; current: boolean }) {
  const t = useT();
  const claims = useMemo(() => checks.filter((c) => c.citations.includes(source.n)), [checks, source.n]);
  const title = source.title || source.url;
  return (
    <li className={current ? "source current" : "source"} data-n={source.n} data-testid="source">
      <p className="site">
        <span className="number">{source.n}</span>
        <SiteMark site={source.site} />
        {source.site}
        {source.date && <time>{source.date}</time>}
      </p>
      <h3>
        {isWeb(source.url) ? (
          <a href={source.url} target="_blank" rel="noopener noreferrer">
            {title}
          </a>
        ) : (
          <span title={source.url}>{title}</span>
        )}
      </h3>
      {source.partial && <p className="problem">{t("search.partial")}</p>}
      <blockquote>{source.passage}</blockquote>
      {claims.length > 0 && (
        <>
          <h4>{t("search.claims")}</h4>
          <ul className="claims">
            {claims.map((check) => (
              <li key={check.start} className={check.found ? "yes" : "no"} title={check.reason} data-testid="claim">
                <strong>{t(check.found ? "search.yes" : "search.no")}</strong>
                <span>
                  {plain(message.content.slice(check.start, check.end)).trim()}
                  {!check.found && check.reason && <small>{check.reason}</small>}
                </span>
              </li>
            ))}
          </ul>
        </>
      )}
      {checks.length > 0 && !claims.length && <h4>{t("search.uncited")}</h4>}
    </li>
  );
}
