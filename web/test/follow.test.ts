import { expect, test } from "vitest";
import { type Api, ApiError } from "../src/lib/api";
import { follow } from "../src/lib/follow";
import type { ChatEvent } from "../src/lib/types";
import { message } from "./make";

type Turn = { events: [string, ChatEvent][]; error?: Error };

/** Plays one turn for each connection; resolves with everything that was told. */
function play(turns: Turn[]): Promise<{ events: ChatEvent[]; afters: string[]; away: boolean[]; error: ApiError | null }> {
  const [events, afters, away]: [ChatEvent[], string[], boolean[]] = [[], [], []];
  const api = {
    async *events(_: string, __: string, after: string) {
      afters.push(after);
      const turn = turns.shift();
      for (const [id, event] of turn?.events ?? []) yield { id, event };
      if (turn?.error) throw turn.error;
    },
  } as unknown as Api;
  return new Promise((resolve) => {
    follow(api, "c", "a", {
      events: (news) => void events.push(...news),
      away: (now) => void away.push(now),
      done: (error) => resolve({ events, afters, away, error }),
    });
  });
}

const running = message({ id: "a", status: "running" });
const done = message({ id: "a", content: "all of it" });

test("a broken connection is taken up again from the last event, until the end", async () => {
  const { events, afters, away, error } = await play([
    { events: [["1", { type: "state", message: running }], ["2", { type: "text", text: "all" }]] },
    { events: [], error: new ApiError("") },
    { events: [["3", { type: "state", message: running }], ["4", { type: "end", message: done }]] },
  ]);
  expect(afters).toEqual(["", "2", "2"]);
  expect(away.at(0)).toBe(true);
  expect(away.at(-1)).toBe(false);
  expect(events.at(-1)).toEqual({ type: "end", message: done });
  expect(error).toBeNull();
});

test("the state of an answer that has ended is enough", async () => {
  const { events, afters } = await play([{ events: [["9", { type: "state", message: done }]] }]);
  expect([events.length, afters.length]).toEqual([1, 1]);
});

test("a refusal is the end", async () => {
  const { error, afters } = await play([{ events: [], error: new ApiError("no such chat", 404) }]);
  expect(error?.status).toBe(404);
  expect(afters).toHaveLength(1);
});
