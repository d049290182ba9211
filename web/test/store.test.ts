import { describe, expect, test } from "vitest";
import { createStore, currentModel, EMPTY, reduce, sortedChats, type Action, type State } from "../src/lib/store";
import type { Answer, Question } from "../src/lib/types";

const question = (id: string, content = `question ${id}`): Question => ({ id, role: "user", content });
const answer = (id: string): Answer => ({ id, role: "assistant", content: "", reasoning: "", status: "streaming", model: "m" });
const run = (...actions: Action[]): State => actions.reduce(reduce, EMPTY);

const asked: Action = { type: "ask", chatId: "c", question: question("q1", "What is krill?"), answer: answer("a1"), at: 10 };
const says = (content: string, at = 20, reasoning = ""): Action => ({ type: "append", chatId: "c", answerId: "a1", reasoning, content, at });
const done: Action = { type: "finish", chatId: "c", answerId: "a1", result: { status: "done" }, at: 30 };
const messages = (state: State) => state.chats.c?.messages ?? [];
const first = (state: State) => messages(state)[1] as Answer;

describe("a conversation", () => {
  test("the first question makes the chat and its title", () => {
    const state = run(asked);
    expect(state.chats.c).toMatchObject({ id: "c", title: "What is krill?", updatedAt: 10 });
    expect(messages(state).map((m) => m.id)).toEqual(["q1", "a1"]);
  });

  test("pieces add up; other messages stay the same objects", () => {
    const before = run(asked, says("Small "), done, { ...asked, question: question("q2"), answer: answer("a2") } as Action);
    const after = reduce(before, { type: "append", chatId: "c", answerId: "a2", reasoning: "", content: "x", at: 40 });
    expect(messages(after).slice(0, 3)).toEqual(messages(before).slice(0, 3));
    messages(before).slice(0, 3).forEach((m, i) => expect(messages(after)[i]).toBe(m));
    expect(first(run(asked, says("Small "), says("animals."))).content).toBe("Small animals.");
  });

  test("pieces for an answer that is gone change nothing", () => {
    const state = run(asked);
    const other = reduce(state, { type: "append", chatId: "c", answerId: "zzz", reasoning: "", content: "x", at: 1 });
    expect(messages(other)).toEqual(messages(state));
    expect(reduce(state, { type: "finish", chatId: "zzz", answerId: "a1", result: {}, at: 1 })).toBe(state);
  });

  test("edit replaces the question, drops what followed and renames the chat", () => {
    const second: Action = { type: "ask", chatId: "c", question: question("q2"), answer: answer("a2"), at: 40 };
    const edit: Action = { type: "edit", chatId: "c", questionId: "q1", content: "What is plankton?", answer: answer("a3"), at: 50 };
    const state = run(asked, done, second, edit);
    expect(messages(state).map((m) => m.id)).toEqual(["q1", "a3"]);
    expect(messages(state)[0]?.content).toBe("What is plankton?");
    expect(state.chats.c?.title).toBe("What is plankton?");
    const later = run(asked, done, second, { ...edit, questionId: "q2" } as Action);
    expect(messages(later).map((m) => m.id)).toEqual(["q1", "a1", "q2", "a3"]);
    expect(later.chats.c?.title).toBe("What is krill?");
  });

  test("again replaces the last answer only", () => {
    const state = run(asked, says("x"), done, { type: "again", chatId: "c", answer: answer("a2"), at: 50 });
    expect(messages(state).map((m) => m.id)).toEqual(["q1", "a2"]);
    expect(state.chats.c?.updatedAt).toBe(50);
  });
});

describe("thinking", () => {
  test("is timed from its first piece to the answer's first", () => {
    const state = run(asked, says("", 100, "Hm"), says("", 1500, "m."), says("Yes", 3100), says("!", 9000), done);
    expect(first(state)).toMatchObject({ reasoning: "Hmm.", content: "Yes!", thinkingSince: 100, thinkingMs: 3000 });
  });

  test("that is broken off is timed until then", () => {
    const stop: Action = { ...done, result: { status: "stopped" }, at: 600 } as Action;
    expect(first(run(asked, says("", 100, "Hm"), stop))).toMatchObject({ status: "stopped", thinkingMs: 500 });
  });

  test("that never was has no time", () => {
    expect(first(run(asked, says("Yes"), done)).thinkingMs).toBeUndefined();
  });
});

test("a deleted chat can be put back", () => {
  const gone = run(asked, done, { type: "delete", chatId: "c" });
  expect(gone.chats).toEqual({});
  const back = reduce(gone, { type: "put", chat: gone.deleted! });
  expect(messages(back)).toHaveLength(2);
  expect(back.deleted).toBeNull();
});

test("chats are sorted by their last question, streaming does not move them", () => {
  const state = run(asked, { ...asked, chatId: "d", at: 15 } as Action, says("x", 99), done);
  expect(sortedChats(state).map((c) => c.id)).toEqual(["d", "c"]);
});

test("a remembered model that the server no longer has gives way to its first", () => {
  const models = [{ id: "a" }, { id: "b" }];
  expect(currentModel(run({ type: "set", values: { models } }, { type: "settings", settings: { model: "b" } }))?.id).toBe("b");
  expect(currentModel(run({ type: "set", values: { models } }, { type: "settings", settings: { model: "z" } }))?.id).toBe("a");
  expect(currentModel(EMPTY)).toBeUndefined();
});

test("listeners hear of changes, and only of changes", () => {
  const store = createStore(EMPTY);
  let heard = 0;
  const leave = store.subscribe(() => heard++);
  store.dispatch({ type: "delete", chatId: "nothing" });
  expect(heard).toBe(0);
  store.dispatch(asked);
  leave();
  store.dispatch(done);
  expect(heard).toBe(1);
});
