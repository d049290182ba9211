import { expect, test } from "vitest";
import { chatFromEvent, deletedInEvent, type Disk, load, save } from "../src/lib/storage";
import { EMPTY, reduce, type State } from "../src/lib/store";
import { DEFAULTS, type Answer } from "../src/lib/types";

class Memory implements Disk {
  entries = new Map<string, string>();
  full = false;
  get length() {
    return this.entries.size;
  }
  key = (index: number) => [...this.entries.keys()][index] ?? null;
  getItem = (name: string) => this.entries.get(name) ?? null;
  removeItem = (name: string) => void this.entries.delete(name);
  setItem(name: string, value: string) {
    if (this.full) throw new DOMException("full", "QuotaExceededError");
    this.entries.set(name, value);
  }
}

const answer: Answer = { id: "a", role: "assistant", content: "Hi.", reasoning: "Hm.", status: "streaming", model: "m" };
const usage = { prompt_tokens: 1, completion_tokens: 2, prompt_cache_hit_tokens: 0 };

function chat(id: string, result: Partial<Answer> = { status: "done", usage, decodeMs: 5, finishReason: "stop" }): State {
  const asked = reduce(EMPTY, { type: "ask", chatId: id, question: { id: "q", role: "user", content: "Hello" }, answer, at: 3 });
  return reduce(asked, { type: "finish", chatId: id, answerId: "a", result, at: 4 });
}

test("what is saved is loaded", () => {
  const disk = new Memory();
  const state: State = { ...chat("c"), key: "sk-1", settings: { ...DEFAULTS, temperature: 0.5, theme: "dark" } };
  expect(save(disk, EMPTY, state)).toBe(true);
  expect(load(disk)).toEqual(state);
});

test("an answer that was being written comes back as interrupted", () => {
  const disk = new Memory();
  save(disk, EMPTY, chat("c", {}));
  expect(disk.getItem("rorqual.chat.c")).toContain("streaming");
  expect(load(disk).chats.c?.messages[1]).toMatchObject({ status: "interrupted", content: "Hi." });
});

test("only what changed is written, what is gone is removed", () => {
  const disk = new Memory();
  const one = chat("one");
  const both = { ...one, chats: { ...one.chats, ...chat("two").chats } };
  save(disk, EMPTY, both);
  disk.full = true;
  expect(save(disk, both, { ...both })).toBe(true); // nothing to write
  const { one: _, ...rest } = both.chats;
  expect(save(disk, both, { ...both, chats: rest })).toBe(true);
  expect(Object.keys(load(disk).chats)).toEqual(["two"]);
});

test("a full storage says so, a missing one too, and neither throws", () => {
  const disk = new Memory();
  disk.full = true;
  expect(save(disk, EMPTY, chat("c"))).toBe(false);
  expect(save(null, EMPTY, chat("c"))).toBe(false);
  expect(load(null)).toEqual(EMPTY);
});

test("spoilt entries cost themselves only", () => {
  const disk = new Memory();
  save(disk, EMPTY, chat("good"));
  const bad = ["", "{", "null", "7", "[]", '"x"', "{}", '{"id":7,"messages":[]}', '{"id":"x"}', '{"id":"x","messages":[null,3,{}]}'];
  bad.forEach((value, i) => disk.entries.set(`rorqual.chat.bad${i}`, value));
  disk.entries.set("rorqual.chat.other", disk.getItem("rorqual.chat.good")!); // says it is another
  disk.entries.set("rorqual.settings", '{"temperature":"hot","maxTokens":-1,"theme":"pink","system":7,"thinking":true}');
  const state = load(disk);
  expect(Object.keys(state.chats)).toEqual(["good"]);
  expect(state.settings).toEqual({ ...DEFAULTS, thinking: true });
});

test("a message with spoilt fields keeps its words", () => {
  const disk = new Memory();
  const messages = [{ id: "a", role: "assistant", content: "Hi.", status: 9, usage: { prompt_tokens: "many" }, fault: 3, thinkingMs: "x" }];
  disk.entries.set("rorqual.chat.c", JSON.stringify({ id: "c", messages }));
  expect(load(disk).chats.c?.messages).toEqual([
    { id: "a", role: "assistant", content: "Hi.", reasoning: "", model: "", status: "interrupted" },
  ]);
});

test("other tabs: a finished chat is taken over, one being written is not", () => {
  const json = (result: Partial<Answer>) => JSON.stringify(chat("c", result).chats.c);
  expect(chatFromEvent("rorqual.chat.c", json({ status: "done" }))?.id).toBe("c");
  expect(chatFromEvent("rorqual.chat.c", json({}))).toBeNull();
  expect(chatFromEvent("elsewhere", json({ status: "done" }))).toBeNull();
  expect(deletedInEvent("rorqual.chat.c", null)).toBe("c");
  expect(deletedInEvent("rorqual.chat.c", "{}")).toBeNull();
  expect(deletedInEvent(null, null)).toBeNull();
});
