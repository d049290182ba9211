import { renderToStaticMarkup } from "react-dom/server";
import { describe, expect, test } from "vitest";
import { splitBlocks } from "../src/lib/blocks";
import { byAge, seconds, statsOf, titleOf } from "../src/lib/text";
import type { Answer, Chat } from "../src/lib/types";
import { Markdown } from "../src/ui/Markdown";

test("titles", () => {
  expect(titleOf("  What is\n krill? ")).toBe("What is krill?");
  expect(titleOf("Tell me a very short story about a whale who could not sleep.")).toBe("Tell me a very short story about a whale who…");
  expect(titleOf("   ")).toBe("New chat");
  expect(titleOf("鯨".repeat(80))).toBe(`${"鯨".repeat(48)}…`);
  expect(titleOf("🐋".repeat(80))).toBe(`${"🐋".repeat(48)}…`);
});

test("durations", () => {
  expect([0, 2600, 59_400, 65_000].map(seconds)).toEqual(["0 s", "3 s", "59 s", "1 min 5 s"]);
});

test("the line under an answer", () => {
  const answer: Answer = { id: "a", role: "assistant", content: "", reasoning: "", status: "done", model: "m" };
  const usage = { prompt_tokens: 52, completion_tokens: 41, prompt_cache_hit_tokens: 32, completion_tokens_details: { reasoning_tokens: 10 } };
  expect(statsOf({ ...answer, usage, decodeMs: 2000, finishReason: "stop" })).toEqual([
    "41 tokens (10 thinking)", "20 tokens/s", "32 of 52 prompt tokens from cache",
  ]);
  expect(statsOf({ ...answer, usage: { prompt_tokens: 1, completion_tokens: 1 }, decodeMs: 0, finishReason: "length" })).toEqual([
    "1 token", "cut at the token limit",
  ]);
  expect(statsOf(answer)).toEqual([]);
});

test("chats by age", () => {
  const now = new Date(2026, 5, 15, 12).getTime();
  const chat = (id: string, daysAgo: number): Chat => ({ id, title: id, messages: [], updatedAt: now - daysAgo * 86_400_000 });
  const groups = byAge([chat("a", 0), chat("b", 0.2), chat("c", 1), chat("d", 3), chat("e", 40)], now);
  expect(groups.map(([label, chats]) => [label, chats.map((c) => c.id).join("")])).toEqual([
    ["Today", "ab"], ["Yesterday", "c"], ["Previous 7 days", "d"], ["Older", "e"],
  ]);
});

const SAMPLES = [
  "One.\n\nTwo.\n\nThree.",
  "1. a\n\n2. b\n\n   more of b\n\nAfter.",
  "- a\n  - b\n\n- c\n\n> quote\n> more\n\n> second",
  "Text\n\n```python\na = 1\n\nb = 2\n```\n\nAfter\n\n~~~\n``` not the end\n\nx\n~~~\n\nEnd",
  "````md\n```\n\nx\n```\n\ny\n````\n\nEnd",
  "| a | b |\n|---|--:|\n| 1 | 2 |\n\n# Head\n\nText\nmore",
  "    indented\n\n    code\n\nText",
  "A [link][x] here.\n\nMore[^1].\n\n[x]: https://example.org\n\n[^1]: A note.",
  "```\nnever closed\n\nstill code",
  "",
];

describe("cutting Markdown into blocks", () => {
  test("loses nothing, at any length", () => {
    for (const text of SAMPLES) {
      for (let i = 0; i <= text.length; i++) expect(splitBlocks(text.slice(0, i)).join("")).toBe(text.slice(0, i));
    }
  });

  test("renders the same as the whole", async () => {
    const { default: ReactMarkdown } = await import("react-markdown");
    const { default: gfm } = await import("remark-gfm");
    const html = (text: string) => renderToStaticMarkup(<ReactMarkdown remarkPlugins={[gfm]}>{text}</ReactMarkdown>).replace(/\n+/g, "\n");
    for (const text of SAMPLES) {
      const blocks = splitBlocks(text).map(html).join("\n");
      expect(blocks.trim(), text).toBe(html(text).trim());
    }
  });

  test("a growing text changes its last block only", () => {
    const text = SAMPLES[0]!;
    expect(splitBlocks(text)).toEqual(["One.\n\n", "Two.\n\n", "Three."]);
    expect(splitBlocks(`${text} More.`).slice(0, 2)).toEqual(splitBlocks(text).slice(0, 2));
  });
});

test("Markdown loads nothing and runs nothing", () => {
  const html = renderToStaticMarkup(
    <Markdown
      text={"<script>alert(1)</script> <b onclick=x>b</b> ![p](https://e.org/p.png) [![q](https://e.org/q.png)](https://e.org) [bad](javascript:alert(1)) [data](data:text/html,x) https://e.org/auto"}
    />,
  );
  expect(html).not.toMatch(/<(script|b|img|iframe)[\s>]/);
  expect(html).not.toMatch(/href="(javascript|data):/);
  for (const link of html.match(/<a [^>]*>/g) ?? []) expect(link).toMatch(/target="_blank" rel="noopener noreferrer"/);
  expect(html).not.toMatch(/<a [^>]*>(?:(?!<\/a>).)*<a /); // no link inside a link
});
