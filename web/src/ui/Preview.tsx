import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "react";
import { useDark, useT } from "../hooks";
import { draw } from "../lib/diagrams";
import { Copy, IconButton, saveFile } from "./bits";
import { Source } from "./CodeBlock";
import { PanelFrame } from "./Panel";

const FILES: Readonly<Record<string, [name: string, type: string]>> = {
  html: ["preview.html", "text/html"],
  svg: ["picture.svg", "image/svg+xml"],
  mermaid: ["diagram.mmd", "text/plain"],
};

/** HTML, SVG or a diagram from an answer, in a frame that has no origin, no network and no way out. */
export function Preview({ language, code }: { language: string; code: string }) {
  const t = useT();
  const [shown, setShown] = useState<"preview" | "source">("preview");
  const [run, setRun] = useState(0);
  const html = useDocument(language, code);
  const [name, type] = FILES[language] ?? ["preview.txt", "text/plain"];
  const tools = (
    <>
      <div className="tabs" role="tablist">
        {(["preview", "source"] as const).map((tab) => (
          <button key={tab} type="button" role="tab" aria-selected={shown === tab} onClick={() => setShown(tab)} data-testid={`tab-${tab}`}>
            {t(`code.${tab}`)}
          </button>
        ))}
      </div>
      <IconButton icon="again" label={t("code.reload")} onClick={() => setRun(run + 1)} testId="preview-reload" />
      <Copy text={() => code} label={t("code.copy")} />
      <IconButton
        icon="download"
        label={t("code.download")}
        onClick={() => saveFile(name, new Blob([code], { type }))}
        testId="preview-download"
      />
    </>
  );
  return (
    <PanelFrame title={language === "mermaid" ? t("code.diagram") : language.toUpperCase()} tools={tools} testId="preview-panel">
      {shown === "source" ? (
        <div className="panel-body code flat">
          <Source code={code} language={language} />
        </div>
      ) : html === null ? (
        <p className="drawing">{t("code.drawing")}</p>
      ) : (
        <Frame key={`${run}${html.length}`} html={html} title={t("code.frame", { language })} />
      )}
    </PanelFrame>
  );
}

const page = (body: string, dark: boolean) =>
  `<!doctype html><meta charset="utf-8"><style>html{color-scheme:${dark ? "dark" : "light"}}body{margin:0;min-height:100vh;display:grid;place-items:center;` +
  `font-family:system-ui,sans-serif}svg{max-width:100%;height:auto}</style>${body}`;

/** The document to show; null while a diagram is drawn. */
function useDocument(language: string, code: string): string | null {
  const dark = useDark();
  const [diagram, setDiagram] = useState<string | null>(null);
  useEffect(() => {
    if (language !== "mermaid") return;
    let here = true;
    void draw(code, dark).then((drawn) => here && setDiagram("svg" in drawn ? drawn.svg : `<pre>${escaped(drawn.fault)}</pre>`));
    return () => void (here = false);
  }, [language, code, dark]);
  return useMemo(() => {
    if (language === "mermaid") return diagram === null ? null : page(diagram, dark);
    return language === "svg" ? page(code, false) : code;
  }, [language, code, dark, diagram]);
}

const escaped = (text: string) => text.replace(/[&<]/g, (c) => (c === "&" ? "&amp;" : "&lt;"));

function Frame({ html, title }: { html: string; title: string }) {
  const frame = useRef<HTMLIFrameElement>(null);
  // Before the browser paints: the frame speaks once, and may do so before an ordinary effect runs.
  useLayoutEffect(() => {
    const hear = ({ source, data }: MessageEvent) => {
      if (source !== frame.current?.contentWindow || source === null || data?.ready !== true) return;
      window.removeEventListener("message", hear);
      (source as Window).postMessage({ html }, "*"); // the frame has no origin that could be named
    };
    window.addEventListener("message", hear);
    return () => window.removeEventListener("message", hear);
  }, [html]);
  return (
    <iframe
      ref={frame}
      className="preview"
      src="./preview.html"
      sandbox="allow-scripts"
      referrerPolicy="no-referrer"
      title={title}
      data-testid="preview-frame"
    />
  );
}
