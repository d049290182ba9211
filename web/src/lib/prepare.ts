/** From what a model writes to Markdown that the parser takes: formulas in one spelling, citations marked with their
 *  check, and nothing half-written at the growing end. Code is left as it is. */
import remend from "remend";
import type { Check } from "./types";

/** Fenced blocks (open ones too) and code spans. */
const CODE = /(?:^|\n) {0,3}(`{3,}|~{3,})[^\n]*(?:\n[\s\S]*?(?:\n {0,3}\1[`~]*[ \t]*(?=\n|$)|$)|$)|(`+)(?!`)[^`](?:[\s\S]*?[^`])??\2(?!`)/g;

/** Changes the text outside code; `change` also gets the offset where its piece begins. */
export function outsideCode(text: string, change: (piece: string, offset: number) => string): string {
  let out = "";
  let from = 0;
  for (const match of text.matchAll(CODE)) {
    out += change(text.slice(from, match.index), from) + match[0];
    from = match.index + match[0].length;
  }
  return out + change(text.slice(from), from);
}

/** Marks a formula that stands by itself; see Formula. */
export const DISPLAY = "\\displaystyle{}";

// A blank line or a line starting with "- " or "=" inside a formula would end the paragraph: TeX needs no line breaks.
const oneLine = (tex: string) => tex.trim().replace(/\s*\n\s*/g, " ");
const display = (_: string, tex: string) => (tex.trim() ? `$$${DISPLAY}${oneLine(tex)}$$` : _);
const inline = (_: string, tex: string) => (tex.trim() ? `$$${oneLine(tex)}$$` : _);

/** `\[…\]`, `$$…$$`, `\(…\)` and `$…$` (where it cannot be money) all become `$$…$$` in the line. */
export function formulas(text: string): string {
  if (!/[$\\]/.test(text)) return text;
  return outsideCode(text, (piece) =>
    piece
      .replace(/\$\$([\s\S]+?)\$\$|\\\[([\s\S]+?)\\\]/g, (all, a, b) => display(all, a ?? b))
      .replace(/(?<!\\)\\\(([\s\S]+?)\\\)/g, inline)
      .replace(/(?<![\\$\w])\$(?![\s$])((?:\\[^\n]|[^$\n\\])*?[^\s\\$])\$(?![\w$])/g, inline),
  );
}

const CITATION = /\[citation:\s*(\d{1,3}(?:\s*[,，]\s*\d{1,3})*)\s*\]/g;

/** Adds to each `[citation:n]` what its sentence's check said: `[citation:n:yes]` or `[citation:n:no]`. */
export function citations(text: string, checks: Check[] | null): string {
  if (!checks?.length || !text.includes("[citation:")) return text;
  return outsideCode(text, (piece, offset) =>
    piece.replace(CITATION, (all, numbers: string, index: number) => {
      const at = offset + index;
      const check = checks.find((c) => at >= c.start && at < c.end) ?? checks.findLast((c) => c.end <= at && at - c.end <= 40);
      return check ? `[citation:${numbers}:${check.found ? "yes" : "no"}]` : all;
    }),
  );
}

/** Finds marked or unmarked citations in plain text; groups: the numbers, the verdict. */
export const CITED = /\[citation:\s*(\d{1,3}(?:\s*[,，]\s*\d{1,3})*)\s*(?::(yes|no))?\]/g;

const HALF_CITATION = /\[(?:c(?:i(?:t(?:a(?:t(?:i(?:o(?:n(?::[\d\s,，]*)?)?)?)?)?)?)?)?)?$/;
const HALF_FORMULA = /(?:\$\$(?:(?!\$\$)[\s\S])*|\\\[(?:(?!\\\])[\s\S])*|\\\((?:(?!\\\))[\s\S])*|\\|\$)$/;

/** Takes away or completes what is half-written at the end of a growing text. */
export function growing(text: string): string {
  let last = 0;
  for (const match of text.matchAll(CODE)) last = match.index + match[0].length;
  const tail = text.slice(last);
  // Pairs that are closed do not count: only what is open at the very end.
  const closed = tail.replace(/\$\$[\s\S]+?\$\$|\\\[[\s\S]+?\\\]|\\\([\s\S]+?\\\)/g, (whole) => "\0".repeat(whole.length));
  const half = HALF_CITATION.exec(closed) ?? HALF_FORMULA.exec(closed);
  const kept = half ? text.slice(0, last + half.index) : text;
  return remend(kept, { katex: false, inlineKatex: false, htmlTags: false, linkMode: "text-only", images: false });
}

/** The whole way, in order. */
export function prepare(text: string, live: boolean, checks: Check[] | null): string {
  return formulas(citations(live ? growing(text) : text, checks));
}

/** The text for the clipboard and for screen readers: without citation marks. */
export const plain = (text: string): string => text.replace(CITATION, "");
