import { expect, test } from "vitest";
import { type Api, ApiError } from "../src/lib/api";
import type { Following } from "../src/lib/follow";
import { Session } from "../src/lib/session";
import { createStore, EMPTY } from "../src/lib/store";
import type { Message } from "../src/lib/types";
import { info, message, SETTINGS } from "./make";

/** A server in memory: what was called, what it says, and the streams that are open. */
function world(over: Partial<Record<keyof Api, unknown>> = {}) {
  const calls: [string, ...unknown[]][] = [];
  const streams = new Map<string, Following>();
  const store = createStore(EMPTY);
  const note = (name: string, answer: (...args: never[]) => unknown) => (...args: never[]) => {
    calls.push([name, ...args]);
    return answer(...args);
  };
  const api = {
    setup: note("setup", async () => ({ models: [{ id: "nano", thinking: true }], default_model: "nano", search: { available: true }, prices: [], limits: {}, upload_types: [] })),
    list: note("list", async () => ({ chats: [], next: null })),
    create: note("create", async () => info()),
    change: note("change", async () => info()),
    ask: note("ask", async (chat: string, body: { id: string; parent: string | null; content: string; answer: { id: string } }) => ({
      question: message({ id: body.id, chat, parent: body.parent, role: "user", content: body.content }),
      answer: message({ id: body.answer.id, chat, parent: body.id, status: "running" }),
    })),
    answer: note("answer", async (chat: string, body: { id: string; parent: string }) => message({ id: body.id, chat, parent: body.parent, status: "running" })),
    stop: note("stop", async (chat: string, id: string) => ({ ...store.get().threads[chat]!.messages.get(id)!, status: "stopped", content: "half" })),
    ...Object.fromEntries(Object.entries(over).map(([name, answer]) => [name, note(name, answer as never)])),
  } as unknown as Api;
  const session = new Session(store, api, (_, __, id, on) => {
    streams.set(id, on);
    return () => streams.delete(id);
  });
  const shown = (chat: string): Message[] => store.get().threads[chat]!.path.map((id) => store.get().threads[chat]!.messages.get(id)!);
  return { calls, streams, store, session, shown, names: () => calls.map(([name]) => name) };
}

const settle = () => new Promise((resolve) => setTimeout(resolve));

test("a first question makes a chat, is shown at once and then followed", async () => {
  const { session, shown, streams, names } = world();
  await session.start();
  const chat = session.ask(null, "hello", []);
  expect(shown(chat).map((m) => [m.role, m.status])).toEqual([["user", "done"], ["assistant", "running"]]);
  await settle();
  expect(names().slice(2, 4)).toEqual(["create", "ask"]);
  const [[id, on]] = [...streams] as [[string, Following]];
  on.events([{ type: "text", text: "hi" }]);
  expect(shown(chat)[1]).toMatchObject({ id, content: "hi" });
  on.events([{ type: "end", message: { ...shown(chat)[1]!, status: "done", content: "hi there" } }]);
  on.done(null);
  expect(shown(chat)[1]).toMatchObject({ status: "done", content: "hi there" });
});

test("a question that the server did not take is kept, and sent again with the same ids", async () => {
  let away = true;
  const { session, shown, calls } = world({
    ask: async (chat: string, body: { id: string; answer: { id: string } }) => {
      if (away) throw new ApiError("");
      return { question: message({ id: body.id, chat, role: "user", content: "hello" }), answer: message({ id: body.answer.id, chat, parent: body.id, status: "running" }) };
    },
  });
  await session.start();
  const chat = session.ask(null, "hello", []);
  await settle();
  const [question, answer] = shown(chat) as [Message, Message];
  expect(answer).toMatchObject({ status: "error", unsent: true });
  expect(question).toMatchObject({ content: "hello", unsent: true });
  away = false;
  session.again(chat, answer);
  await settle();
  const bodies = calls.filter(([name]) => name === "ask").map((call) => call[2] as { id: string; answer: { id: string } });
  expect(bodies).toHaveLength(2);
  expect([bodies[0]!.id, bodies[0]!.answer.id]).toEqual([bodies[1]!.id, bodies[1]!.answer.id]);
  expect(shown(chat).map((m) => [m.status, m.unsent])).toEqual([["done", undefined], ["running", undefined]]);
});

test("before the page goes, an unsent question becomes a draft", async () => {
  const { session, store } = world({ create: async () => Promise.reject(new ApiError("")) });
  await session.start();
  session.ask(null, "do not lose me", []);
  await settle();
  session.rescue();
  expect(store.get().drafts.new).toMatchObject({ text: "do not lose me" });
});

test("answering again, editing and choosing make and show siblings", async () => {
  const { session, shown, store, calls } = world();
  await session.start();
  const chat = session.ask(null, "first", []);
  await settle();
  const [question, answer] = shown(chat) as [Message, Message];
  session.again(chat, answer);
  await settle();
  expect(shown(chat)[1]!.id).not.toBe(answer.id);
  session.choose(chat, answer.id);
  expect(shown(chat)[1]!.id).toBe(answer.id);
  expect(calls.at(-1)).toEqual(["change", chat, { head: answer.id }]);
  session.edit(chat, question, "second");
  await settle();
  expect(shown(chat)[0]!.content).toBe("second");
  expect(store.get().threads[chat]!.children.get("")).toHaveLength(2);
});

test("stop takes the server's word for what there is", async () => {
  const { session, shown, streams } = world();
  await session.start();
  const chat = session.ask(null, "slow", []);
  await settle();
  await session.stop(chat, shown(chat)[1]!.id);
  expect(streams.size).toBe(0);
  expect(shown(chat)[1]).toMatchObject({ status: "stopped", content: "half" });
});

test("a refused key asks for one", async () => {
  const { session, store } = world({ setup: async () => Promise.reject(new ApiError("no key", 401)) });
  await session.start();
  expect(store.get()).toMatchObject({ askKey: true, fault: { status: 401 } });
});

test("a deleted chat is gone at once; undo imports what was exported before", async () => {
  const kept = { name: "x.json", body: new Blob(['{"title":"x"}']) };
  const { session, store, names, calls } = world({
    exported: async () => kept,
    remove: async () => undefined,
    restore: async () => ({ ...info({ id: "c2" }), messages: [] }),
  });
  await session.delete("c", { deleted: "gone", undo: "undo" });
  expect(names().slice(0, 2)).toEqual(["exported", "remove"]);
  store.get().toast!.action!.run();
  await settle();
  await settle();
  expect(calls.find(([name]) => name === "restore")).toEqual(["restore", { title: "x" }]);
});

test("switches are told to the server and start the next chat; a system prompt stays with its own", async () => {
  const { session, store, calls } = world();
  await session.start();
  const chat = session.ask(null, "x", []);
  await settle();
  session.settings(chat, { thinking: true, system: "Be brief." });
  session.settings(chat, { system: "Be very brief." });
  session.rescue(); // what waits is told when the page goes
  const told = calls.filter(([name]) => name === "change");
  expect(told).toEqual([["change", chat, { settings: { thinking: true, system: "Be very brief." } }, true]]);
  expect(store.get().prefs.settings).toEqual({ thinking: true });
  expect(store.get().threads[chat]!.info.settings).toEqual({ ...SETTINGS, thinking: true, system: "Be very brief." });
});
