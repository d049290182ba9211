import { useEffect, useState } from "react";
import { useDark, useT } from "../hooks";
import { draw, type Drawn, imageOf } from "../lib/diagrams";
import { Source } from "./CodeBlock";

/** A Mermaid diagram as an image; its source where it has a mistake. */
export function Diagram({ code }: { code: string }) {
  const t = useT();
  const dark = useDark();
  const [drawn, setDrawn] = useState<Drawn | null>(null);
  useEffect(() => {
    let here = true;
    void draw(code, dark).then((result) => here && setDrawn(result));
    return () => void (here = false);
  }, [code, dark]);
  if (!drawn) return <p className="drawing">{t("code.drawing")}</p>;
  if ("svg" in drawn) {
    return (
      <div className="canvas" tabIndex={0} role="group" aria-label={t("code.diagram")}>
        <img className="diagram" src={imageOf(drawn.svg)} alt={`${t("code.diagram")}: ${code}`} data-testid="diagram" />
      </div>
    );
  }
  return (
    <>
      <p className="drawing" role="note">
        {t("code.wrong", { reason: drawn.fault.split("\n")[0] ?? "" })}
      </p>
      <Source code={code} language="mermaid" />
    </>
  );
}
