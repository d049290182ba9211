import { expect, test } from "vitest";
import { costOf, dollars, roughTokens, totalsOf } from "../src/lib/cost";
import { fileName } from "../src/lib/api";
import { message } from "./make";

const usage = { prompt_tokens: 1_000_000, cached_tokens: 400_000, completion_tokens: 100_000, reasoning_tokens: 50_000, tokens_per_s: 9 };

test("every answer of the tree counts, cached tokens at their own price", () => {
  const messages = new Map([["a", message({ id: "a", usage })], ["b", message({ id: "b", usage })], ["q", message({ id: "q", role: "user" })]]);
  const totals = totalsOf(messages);
  expect(totals).toEqual({ prompt: 2_000_000, cached: 800_000, completion: 200_000, reasoning: 100_000 });
  expect(costOf(totals, { name: "V3", input_miss: 0.27, input_hit: 0.07, output: 1.1 })).toBeCloseTo(0.324 + 0.056 + 0.22);
});

test("small amounts keep two figures", () => {
  expect([0, 1.234, 0.0123, 0.00123, 0.0000456, 1e-9].map(dollars)).toEqual(["$0", "$1.23", "$0.01", "$0.0012", "$0.000046", "< $0.000001"]);
});

test("tokens by DeepSeek's rule of thumb", () => {
  expect([roughTokens("a".repeat(100)), roughTokens("鲸".repeat(100))]).toEqual([30, 60]);
});

test("the name of a download", () => {
  const of = (value: string) => fileName({ headers: new Headers({ "Content-Disposition": value }) });
  expect(of('attachment; filename="a b.md"')).toBe("a b.md");
  expect(of("attachment; filename=\"x.md\"; filename*=UTF-8''%E9%B2%B8.md")).toBe("鲸.md");
  expect(of("attachment")).toBeNull();
});
