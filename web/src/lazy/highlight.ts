/** Syntax colours: a chunk of its own, loaded by the first code block. */
import type { Root } from "hast";
import dockerfile from "highlight.js/lib/languages/dockerfile";
import latex from "highlight.js/lib/languages/latex";
import { common, createLowlight } from "lowlight";

const lowlight = createLowlight({ ...common, dockerfile, latex });
const OTHER: Readonly<Record<string, string>> = { mermaid: "", vue: "xml", svelte: "xml", toml: "ini", jsonc: "json", docker: "dockerfile", tex: "latex" };
const LONGEST = 60_000;

/** The code as a tree of coloured spans, or null for a language that is not known. */
export function highlight(code: string, language: string): Root | null {
  const name = OTHER[language.toLowerCase()] ?? language.toLowerCase();
  return name && code.length <= LONGEST && lowlight.registered(name) ? lowlight.highlight(name, code) : null;
}
