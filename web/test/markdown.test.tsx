import { renderToStaticMarkup } from "react-dom/server";
import { expect, test } from "vitest";
import { SessionContext } from "../src/hooks";
import type { Api } from "../src/lib/api";
import { splitBlocks } from "../src/lib/blocks";
import { Session } from "../src/lib/session";
import { createStore, EMPTY } from "../src/lib/store";
import { SourcesContext } from "../src/ui/Citation";
import { previewOf } from "../src/ui/CodeBlock";
import { Markdown } from "../src/ui/Markdown";

const session = new Session(createStore(EMPTY), {} as Api);
const source = { n: 1, url: "https://a.example", title: "A <b>title</b>", site: "a.example", date: null, passage: "p" };

const html = (text: string, live = false) =>
  renderToStaticMarkup(
    <SessionContext value={session}>
      <SourcesContext value={{ sources: [source], open: () => undefined }}>
        <Markdown text={text} live={live} checks={[{ start: 0, end: 20, citations: [1], found: true, reason: "" }]} />
      </SourcesContext>
    </SessionContext>,
  );

test("what a model writes becomes no markup of its own", () => {
  const text = '<script>x</script> <img src=x onerror=y> [a](javascript:x) [b](JAVA\tSCRIPT:x) [c](data:text/html,x) ![d](javascript:x) <svg onload=x>';
  const out = html(text);
  expect(out).not.toMatch(/<script|<img|<svg|onerror="|onload="|href="(?!https?:)/i);
  expect(out).toContain("&lt;script&gt;");
});

test("pictures are never loaded", () => {
  expect(html("![whale](https://e.example/x.png)")).toMatch(/<a class="picture" href="https:\/\/e.example\/x.png"/);
  expect(html("![whale](https://e.example/x.png)")).not.toContain("<img");
});

test("citations become chips, unknown ones no buttons, in code they stay text", () => {
  const out = html("True[citation:1]. Odd[citation:7]. `[citation:1]`");
  expect(out).toMatch(/<button[^>]*class="chip yes"[^>]*aria-label="Source 1: A &lt;b&gt;title&lt;\/b&gt;, found in the source"/);
  expect(out).toMatch(/<sup class="chip unknown"[^>]*>7<\/sup>/);
  expect(out).toContain("<code>[citation:1]</code>");
});

test("formulas wait for their typesetter with their source, money stays money", () => {
  expect(html("At $v=5$ for $5 or $6")).toContain('class="formula"');
  expect(html("At $v=5$ for $5 or $6")).toContain("$5 or $6");
  expect(html("\\[ x \\]")).toContain("formula display");
});

test("what can be previewed", () => {
  expect([previewOf("html", ""), previewOf("svg", "<svg>"), previewOf("xml", "<a/>"), previewOf("mermaid", ""), previewOf("", "<!DOCTYPE html>"), previewOf("python", "")]).toEqual(["html", "svg", null, "mermaid", "html", null]);
});

test("blocks together are the text, and a fence is never cut", () => {
  const text = "# A\n\npara\n\n- one\n\n- two\n\n```js\na\n\nb\n```\n\nend";
  const blocks = splitBlocks(text);
  expect(blocks.join("")).toBe(text);
  expect(blocks.filter((b) => b.includes("```js"))).toEqual(["```js\na\n\nb\n```\n\n"]);
  expect(splitBlocks("[^1]\n\n[^1]: note")).toHaveLength(1);
});
