import { useLayoutEffect, useRef } from "react";
import { lazyModule } from "../hooks";
import { DISPLAY } from "../lib/prepare";

const useKatex = lazyModule(() => import("../lazy/katex").then((m) => m.default));

/** A formula, set by KaTeX once it is loaded. It writes into the element itself, by way of the DOM: the page's policy
 *  forbids style attributes in markup, but not styles set by script. */
export function Formula({ tex, display = tex.startsWith(DISPLAY) }: { tex: string; display?: boolean }) {
  const katex = useKatex();
  const box = useRef<HTMLSpanElement>(null);
  const source = tex.startsWith(DISPLAY) ? tex.slice(DISPLAY.length) : tex;
  useLayoutEffect(() => {
    if (katex && box.current) katex.render(source, box.current, { displayMode: display, throwOnError: false, trust: false, strict: "ignore" });
  }, [katex, source, display]);
  return (
    <span ref={box} className={display ? "formula display" : "formula"} {...(display && { tabIndex: 0, role: "group" })} data-testid="formula">
      {katex ? null : source}
    </span>
  );
}
