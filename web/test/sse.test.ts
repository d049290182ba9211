import { expect, test } from "vitest";
import { SseDecoder } from "../src/lib/sse";

const STREAM = [
  "\uFEFF: keep-alive\n\n",
  'data: {"a":"wörd 🐋"}\n\n',
  "data:no space\r\n\r\n",
  "event: ping\nid: 7\nretry: 10\n\n",
  "data: two\r\ndata: lines\r\n\r\n",
  ": keep-alive\r\rdata: cr only\r\r",
  "data\n\n",
  "data:  one space kept\n\n",
  "data: [DONE]\n\n",
].join("");
const EVENTS = ['{"a":"wörd 🐋"}', "no space", "two\nlines", "cr only", "", " one space kept", "[DONE]"];

function decode(...chunks: Uint8Array[]): string[] {
  const decoder = new SseDecoder();
  return [...chunks.flatMap((chunk) => decoder.push(chunk)), ...decoder.end()].map((event) => event.data);
}

const bytes = new TextEncoder().encode(STREAM);

test("one chunk", () => {
  expect(decode(bytes)).toEqual(EVENTS);
});

test("cut in two at every byte", () => {
  for (let i = 0; i <= bytes.length; i++) {
    expect(decode(bytes.subarray(0, i), bytes.subarray(i)), `cut at ${i}`).toEqual(EVENTS);
  }
});

test("cut in three at every pair of bytes", () => {
  for (let i = 0; i <= bytes.length; i++) {
    for (let j = i; j <= bytes.length; j++) {
      const events = decode(bytes.subarray(0, i), bytes.subarray(i, j), bytes.subarray(j));
      if (events.join("|") !== EVENTS.join("|")) expect(events, `cut at ${i} and ${j}`).toEqual(EVENTS);
    }
  }
});

test("byte by byte, with empty chunks between", () => {
  const chunks = Array.from(bytes, (byte) => [Uint8Array.of(byte), new Uint8Array()]).flat();
  expect(decode(...chunks)).toEqual(EVENTS);
});

test("an event is given out as soon as its blank line is there", () => {
  const decoder = new SseDecoder();
  expect(decoder.push(new TextEncoder().encode("data: x\n"))).toEqual([]);
  expect(decoder.push(new TextEncoder().encode("\ndata: y"))).toEqual([{ id: "", data: "x" }]);
});

test("a stream that ends without the last blank line, or without a newline", () => {
  for (const tail of ["data: x\n", "data: x", "data: x\r"]) {
    expect(decode(new TextEncoder().encode(tail))).toEqual(["x"]);
  }
});

test("a hundred thousand events in one chunk take no quadratic time", () => {
  const many = new TextEncoder().encode("data: x\n\n".repeat(100_000));
  const start = performance.now();
  expect(decode(many)).toHaveLength(100_000);
  expect(performance.now() - start).toBeLessThan(2000);
});

test("the last id goes with every event after it", () => {
  const decoder = new SseDecoder();
  const events = decoder.push(new TextEncoder().encode("data: a\n\nid: 7\ndata: b\n\ndata: c\n\n"));
  expect(events.map((event) => event.id)).toEqual(["", "7", "7"]);
});
