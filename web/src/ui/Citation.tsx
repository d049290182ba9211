import { PreviewCard } from "@base-ui/react/preview-card";
import { createContext, useContext } from "react";
import { useT } from "../hooks";
import type { Source } from "../lib/types";

/** The sources of the answer around, and how to open the drawer at one of them. */
export const SourcesContext = createContext<{ sources: readonly Source[]; open: (n: number) => void } | null>(null);

const PREVIEW_CHARS = 220;

/** A citation as a chip: number, verdict, and the passage on hover. Without a source of that number it is plain text. */
export function Citation({ n, verdict }: { n: number; verdict: boolean | null }) {
  const t = useT();
  const context = useContext(SourcesContext);
  const source = context?.sources.find((s) => s.n === n);
  if (!context || !source) return <sup className="chip unknown" title={t("search.unknown")}>{n}</sup>;
  const said = verdict === null ? "" : t(verdict ? "search.cite.yes" : "search.cite.no");
  const label = [t("search.cite", { n, title: source.title || source.site }), said].filter(Boolean).join(", ");
  const look = verdict === null ? "chip" : verdict ? "chip yes" : "chip no";
  return (
    <PreviewCard.Root>
      <PreviewCard.Trigger
        delay={250}
        closeDelay={120}
        render={<button type="button" className={look} aria-label={label} onClick={() => context.open(n)} data-testid="citation" />}
      >
        {n}
      </PreviewCard.Trigger>
      <PreviewCard.Portal>
        <PreviewCard.Positioner className="layer" sideOffset={6} collisionPadding={10}>
          <PreviewCard.Popup className="card">
            <p className="site">
              <SiteMark site={source.site} />
              {source.site}
            </p>
            <strong>{source.title || source.url}</strong>
            <p>{clipped(source.passage)}</p>
            {said && <p className={verdict ? "verdict yes" : "verdict no"}>{said}</p>}
          </PreviewCard.Popup>
        </PreviewCard.Positioner>
      </PreviewCard.Portal>
    </PreviewCard.Root>
  );
}

const clipped = (text: string) => (text.length > PREVIEW_CHARS ? `${text.slice(0, PREVIEW_CHARS).trimEnd()}…` : text);

/** A letter in place of a site's own picture, which would have to be fetched from it. */
export function SiteMark({ site }: { site: string }) {
  const name = site.replace(/^www\./, "");
  let hue = 0;
  for (const letter of name) hue = (hue * 31 + letter.charCodeAt(0)) % 6;
  return (
    <span className={`site-mark hue-${hue}`} aria-hidden="true">
      {(name[0] ?? "?").toUpperCase()}
    </span>
  );
}
