import { toJsxRuntime } from "hast-util-to-jsx-runtime";
import { memo, useContext, useEffect, useMemo, useRef, useState } from "react";
import { Fragment, jsx, jsxs } from "react/jsx-runtime";
import { lazyModule, useSession, useT } from "../hooks";
import { Copy } from "./bits";
import { Diagram } from "./Diagram";
import { Icon } from "./icons";
import { LiveContext } from "./Markdown";

const useHighlight = lazyModule(() => import("../lazy/highlight").then((m) => m.highlight));

const SHOWN: Readonly<Record<string, string>> = { html: "html", htm: "html", svg: "svg", xml: "svg", mermaid: "mermaid" };

/** What a block can be previewed as: its language, or SVG by its first word. */
export function previewOf(language: string, code: string): string | null {
  const kind = SHOWN[language.toLowerCase()];
  if (kind === "svg") return /<svg[\s>]/i.test(code) ? "svg" : null;
  return kind ?? (language === "" && /^\s*(<!doctype html|<html)/i.test(code) ? "html" : null);
}

export const CodeBlock = memo(function CodeBlock({ code, language }: { code: string; language: string }) {
  const t = useT();
  const session = useSession();
  const live = useContext(LiveContext);
  const preview = live ? null : previewOf(language, code);
  const drawn = preview === "mermaid";
  const [source, setSource] = useState(false);
  return (
    <div className="code" data-testid="code-block">
      <div className="code-head">
        <span className="language">{language || t("code.label")}</span>
        {drawn && (
          <button type="button" className="word-button" aria-pressed={source} onClick={() => setSource(!source)}>
            <Icon name="code" size={14} />
            <span>{t("code.source")}</span>
          </button>
        )}
        {preview && (
          <button
            type="button"
            className="word-button"
            onClick={() => session.show({ kind: "preview", language: preview, code })}
            data-testid="preview"
          >
            <Icon name="play" size={14} />
            <span>{t("code.preview")}</span>
          </button>
        )}
        <Copy text={() => code} label={t("code.copy")} word testId="copy-code" />
      </div>
      {drawn && !source ? <Diagram code={code} /> : <Source code={code} language={language} live={live} />}
    </div>
  );
});

const PAUSE_MS = 120;

/** Code in colours. While it grows, what is new stays plain for a moment: colouring all of it again for every
 *  token would cost more with each line. */
export function Source({ code, language, live = false }: { code: string; language: string; live?: boolean }) {
  const t = useT();
  const highlight = useHighlight();
  const [steady, setSteady] = useState(code);
  const last = useRef(0);
  useEffect(() => {
    if (!live) return setSteady(code);
    const wait = Math.max(0, PAUSE_MS - (performance.now() - last.current));
    const timer = setTimeout(() => {
      last.current = performance.now();
      setSteady(code);
    }, wait);
    return () => clearTimeout(timer);
  }, [code, live]);
  const painted = code.startsWith(steady) ? steady : code;
  const tree = useMemo(() => highlight?.(painted, language) ?? null, [highlight, painted, language]);
  return (
    <pre tabIndex={0} role="group" aria-label={`${t("code.label")} ${language}`.trim()}>
      <code>
        {tree ? toJsxRuntime(tree, { Fragment, jsx, jsxs }) : painted}
        {code.slice(painted.length)}
      </code>
    </pre>
  );
}
