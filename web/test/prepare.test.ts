import { expect, test } from "vitest";
import { citations, CITED, DISPLAY, formulas, growing, plain, prepare } from "../src/lib/prepare";
import type { Check } from "../src/lib/types";

const check = (start: number, end: number, found: boolean): Check => ({ start, end, citations: [1], found, reason: "" });

test("every spelling of a formula becomes one", () => {
  expect(formulas("a \\(x+1\\) b")).toBe("a $$x+1$$ b");
  expect(formulas("at $v = 5$ m/s")).toBe("at $$v = 5$$ m/s");
  expect(formulas("\\[\nE = mc^2\n\\]")).toBe(`$$${DISPLAY}E = mc^2$$`);
  expect(formulas("$$\na\n\n- b\n$$")).toBe(`$$${DISPLAY}a - b$$`);
});

test("money, escapes and code are no formulas", () => {
  for (const text of ["$5 or $10", "costs $5, not $6.", "US$5 and US$6", "\\$x\\$", "`$x$`", "```\n$x$\n\\[a\\]\n```", "`\\(a\\)`", "~~~\n$$a$$\n~~~"]) {
    expect(formulas(text)).toBe(text);
  }
});

test("a citation carries the verdict of its sentence", () => {
  const text = "One[citation:1]. Two[citation:2][citation:3]. `[citation:1]`";
  const marked = citations(text, [check(0, 16, true), check(17, 45, false)]);
  expect(marked).toBe("One[citation:1:yes]. Two[citation:2:no][citation:3:no]. `[citation:1]`");
  expect(citations(text, null)).toBe(text);
  expect([...marked.matchAll(CITED)].map((m) => [m[1], m[2]])).toEqual([["1", "yes"], ["2", "no"], ["3", "no"], ["1", undefined]]);
});

test("at every cut of a growing answer no half citation and no half formula is shown", () => {
  const text = "Blue whales[citation:1] eat \\(krill^2\\) and $$\\sum_i x_i$$ or \\[ a \\] daily[citation:2, 3].";
  for (let cut = 0; cut <= text.length; cut++) {
    const shown = prepare(text.slice(0, cut), true, null);
    const left = shown.replace(CITED, "").replace(/\$\$[^$]+\$\$/g, "");
    expect(left, `cut at ${cut}`).not.toMatch(/\[c|citation|\$|\\[[(]/);
  }
  expect(growing("so [c")).toBe("so");
});

test("what is bold or code while it grows is closed, fences are left to grow", () => {
  expect(growing("a **bo")).toBe("a **bo**");
  expect(growing("```python\nx = [1, 2")).toBe("```python\nx = [1, 2");
  expect(growing("- [ ] task")).toBe("- [ ] task");
});

test("the clipboard gets no citation marks", () => {
  expect(plain("a[citation:1][citation:2, 3].")).toBe("a.");
});
