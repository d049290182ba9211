import { expect, test } from "vitest";
import { shapeOf, siblingsOf } from "../src/lib/tree";
import type { Message } from "../src/lib/types";
import { message } from "./make";

const tree = (...pairs: [string, string | null][]) => new Map<string, Message>(pairs.map(([id, parent]) => [id, message({ id, parent })]));

const CHAT = tree(["q1", null], ["a1", "q1"], ["a2", "q1"], ["q2", "a2"], ["b1", "q2"], ["q3", "a2"], ["c1", "q3"]);

test("without a head the newest branch is shown", () => {
  expect(shapeOf(CHAT, null).path).toEqual(["q1", "a2", "q3", "c1"]);
  expect(shapeOf(CHAT, "not there").path).toEqual(["q1", "a2", "q3", "c1"]);
});

test("a head in the middle is followed to the newest leaf below it", () => {
  expect(shapeOf(CHAT, "a1").path).toEqual(["q1", "a1"]);
  expect(shapeOf(CHAT, "q2").path).toEqual(["q1", "a2", "q2", "b1"]);
  expect(shapeOf(CHAT, "q1").path).toEqual(["q1", "a2", "q3", "c1"]);
});

test("siblings are those with the same parent, roots too", () => {
  const { children } = shapeOf(CHAT, null);
  expect(siblingsOf(CHAT, children, "a1")).toEqual(["a1", "a2"]);
  expect(siblingsOf(CHAT, children, "q3")).toEqual(["q2", "q3"]);
  const two = tree(["x", null], ["y", null]);
  expect(siblingsOf(two, shapeOf(two, null).children, "x")).toEqual(["x", "y"]);
});

test("an orphan is a root, a circle ends", () => {
  const orphan = tree(["a", "gone"], ["b", "a"]);
  expect(shapeOf(orphan, null).path).toEqual(["a", "b"]);
  const circle = tree(["a", "b"], ["b", "a"]);
  expect(shapeOf(circle, "a").path.length).toBeLessThanOrEqual(2);
});

test("ten thousand messages take a moment", () => {
  const pairs = Array.from({ length: 10_000 }, (_, n): [string, string | null] => [`m${n}`, n ? `m${n - 1}` : null]);
  const start = performance.now();
  expect(shapeOf(tree(...pairs), null).path).toHaveLength(10_000);
  expect(performance.now() - start).toBeLessThan(1000);
});
