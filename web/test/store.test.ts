import { expect, test } from "vitest";
import { after, createStore, EMPTY, inOrder, settingsOf, withInfo, withMessages, withThread } from "../src/lib/store";
import type { Setup } from "../src/lib/types";
import { info, message, SETTINGS } from "./make";

const live = message({ id: "a", parent: "q", status: "running" });

test("deltas of one frame make one new message; the old one is untouched", () => {
  const next = after(live, [{ type: "thinking", text: "hm" }, { type: "thinking", text: "m" }, { type: "text", text: "yes" }], 5000);
  expect(next).toMatchObject({ thinking: "hmm", content: "yes", thinkingSince: 5000, thinking_s: 0 });
  expect(live.thinking).toBeNull();
  expect(after(next, [{ type: "text", text: "!" }], 9000).thinking_s).toBe(0);
});

test("a state replaces everything: what was missed is there, what was ahead is not doubled", () => {
  const seen = after(live, [{ type: "text", text: "Hello wor" }], 1);
  const state = { ...live, content: "Hello world, and more" };
  const next = after(seen, [{ type: "state", message: state }, { type: "text", text: "!" }], 2);
  expect(next.content).toBe("Hello world, and more!");
});

test("a thought that was under way before a reload is timed from the answer's beginning", () => {
  const state = { ...live, created: 100, thinking: "so far" };
  expect(after(live, [{ type: "state", message: state }], 130_000).thinkingSince).toBe(100_000);
  const told = { ...live, created: 100, thinking: "so far", thinking_s: 12 };
  const next = after(live, [{ type: "state", message: told }], 130_000);
  expect(next.thinkingSince).toBe(118_000);
  expect(after(next, [{ type: "text", text: "So" }], 133_000).thinking_s).toBe(15);
});

test("search goes through its phases and ends with checks", () => {
  const search = { queries: ["q"], sources: [], failed: null };
  const checks = [{ start: 0, end: 1, citations: [1], found: true, reason: "" }];
  const next = after(live, [{ type: "search", search, phase: "reading" }, { type: "checks", checks }], 1);
  expect(next).toMatchObject({ search, phase: "reading", checks });
});

test("content that grows leaves the shape alone; a new message moves the path", () => {
  const store = createStore(withThread(EMPTY, { ...info({ head: "a" }), messages: [message({ id: "q", role: "user" }), live] }));
  const { path } = store.get().threads.c!;
  store.update((s) => withMessages(s, "c", [{ ...live, content: "x" }]));
  expect(store.get().threads.c!.path).toBe(path);
  store.update((s) => withMessages(s, "c", [message({ id: "b", parent: "q" })], "b"));
  expect(store.get().threads.c!.path).toEqual(["q", "b"]);
  expect(withMessages(store.get(), "other", [live])).toBe(store.get());
});

test("what the server has not taken stays when the chat is read again", () => {
  const one = withThread(EMPTY, { ...info(), messages: [] });
  const two = withMessages(one, "c", [message({ id: "mine", role: "user", unsent: true })]);
  const three = withThread(two, { ...info(), messages: [message({ id: "q", role: "user" })] });
  expect([...three.threads.c!.messages.keys()]).toEqual(["q", "mine"]);
});

test("a new title shows in the list too", () => {
  const row = { id: "c", title: "old", pinned: false, created: 1, updated: 1, model: null };
  const state = withThread({ ...EMPTY, list: { ...EMPTY.list, chats: [row] } }, { ...info(), messages: [] });
  const next = withInfo(state, "c", { title: "new" });
  expect([next.threads.c!.info.title, next.list.chats[0]!.title]).toEqual(["new", "new"]);
});

test("pinned first, then newest", () => {
  const row = (id: string, pinned: boolean, updated: number) => ({ id, title: id, pinned, created: 0, updated, model: null });
  expect(inOrder([row("a", false, 3), row("b", true, 1), row("c", false, 5)]).map((c) => c.id)).toEqual(["b", "c", "a"]);
});

test("a chat's settings fall back on what the server has", () => {
  const setup: Setup = {
    models: [{ id: "big", context_length: 1, thinking: true, max_output: 1 }, { id: "nano", context_length: 1, thinking: true, max_output: 1 }],
    default_model: "nano",
    search: { available: false, provider: null, local_index: false },
    prices: [],
    limits: { file_bytes: 1, files_per_message: 1, content_chars: 1 },
    upload_types: [],
  };
  const state = { ...EMPTY, setup, prefs: { ...EMPTY.prefs, settings: { model: "gone", search: true, thinking: true } } };
  expect(settingsOf(state, null)).toEqual({ ...SETTINGS, model: "nano", thinking: true });
  const open = withThread(state, { ...info({ settings: { ...SETTINGS, model: "big", system: "Be brief." } }), messages: [] });
  expect(settingsOf(open, "c")).toMatchObject({ model: "big", system: "Be brief.", thinking: false });
});
