import { afterEach, expect, test, vi } from "vitest";
import { pieces, requestBody } from "../src/lib/api";
import { Session } from "../src/lib/session";
import { createStore, EMPTY, type State } from "../src/lib/store";
import { DEFAULTS, type Answer, type Message } from "../src/lib/types";

const MODEL = { id: "nano", thinking: true };
const piece = (delta: object, more: object = {}) => `data: ${JSON.stringify({ choices: [{ index: 0, delta, ...more }] })}\n\n`;
const usage = { prompt_tokens: 5, completion_tokens: 2 };
const USAGE = `data: ${JSON.stringify({ choices: [], usage })}\n\n`;
const DONE = "data: [DONE]\n\n";

/** A session whose server answers with these chunks; an Error among them breaks the connection. */
function session(...answer: (string | Error | Response)[]) {
  const sent: { path: string; body: any; headers: Headers }[] = [];
  vi.stubGlobal("fetch", async (path: string, init: RequestInit) => {
    sent.push({ path, body: init.body ? JSON.parse(init.body as string) : null, headers: new Headers(init.headers) });
    if (answer[0] instanceof Response) return answer[0].clone();
    const stream = new ReadableStream({
      async start(controller) {
        init.signal?.addEventListener("abort", () => controller.error(init.signal?.reason));
        for (const chunk of answer) {
          await new Promise((next) => setTimeout(next)); // an error throws away what was not read yet
          if (chunk instanceof Error) return controller.error(chunk);
          controller.enqueue(new TextEncoder().encode(chunk as string));
        }
        if (answer.at(-1) !== "") controller.close(); // "" leaves the stream open
      },
    });
    return new Response(stream);
  });
  const store = createStore({ ...EMPTY, models: [MODEL] });
  return { session: new Session(store), store, sent };
}

async function ended(store: { get(): State }, id: string): Promise<Answer> {
  return vi.waitFor(() => {
    const last = store.get().chats[id]?.messages.at(-1) as Answer;
    expect(last.status).not.toBe("streaming");
    return last;
  });
}

afterEach(() => vi.unstubAllGlobals());

test("an answer, from question to usage", async () => {
  const { session: s, store, sent } = session(
    ": keep-alive\n\n", piece({ role: "assistant", content: null, reasoning_content: "Hm." }),
    piece({ content: "Hel" }), piece({ content: "lo" }), piece({}, { finish_reason: "stop" }), USAGE, DONE,
  );
  const id = s.ask(null, "Hi");
  expect(await ended(store, id)).toMatchObject({ status: "done", reasoning: "Hm.", content: "Hello", finishReason: "stop", usage, model: "nano" });
  expect(sent[0]).toMatchObject({ path: "v1/chat/completions", body: { stream: true, stream_options: { include_usage: true }, thinking: { type: "disabled" } } });
  expect(sent[0]?.body.messages).toEqual([{ role: "user", content: "Hi" }]);
});

test("no [DONE], a lost connection, a stream of nonsense: what came is kept", async () => {
  for (const chunks of [[piece({ content: "So far" })], [piece({ content: "So far" }), new Error("gone")], [piece({ content: "So far" }), "data: <html>\n\n"]]) {
    const { session: s, store } = session(...chunks);
    const answer = await ended(store, s.ask(null, "Hi"));
    expect(answer).toMatchObject({ status: "interrupted", content: "So far" });
    expect(answer.fault?.message).toBeTruthy();
  }
});

test("an error inside the stream is the server's word", async () => {
  const { session: s, store } = session(piece({ content: "So far" }), 'data: {"error":{"message":"out of memory"}}\n\n');
  expect(await ended(store, s.ask(null, "Hi"))).toMatchObject({ status: "error", content: "So far", fault: { message: "out of memory" } });
});

test("HTTP errors with and without the API's body", async () => {
  const refused = session(new Response('{"error":{"message":"too busy","code":null}}', { status: 503 }));
  expect(await ended(refused.store, refused.session.ask(null, "Hi"))).toMatchObject({ status: "error", fault: { message: "too busy", status: 503 } });
  const proxy = session(new Response("<h1>Bad gateway</h1>", { status: 502 }));
  expect((await ended(proxy.store, proxy.session.ask(null, "Hi"))).fault).toEqual({ message: "The server answered with status 502.", status: 502 });
});

test("401 asks for a key; the key is sent and the question repeated", async () => {
  const { session: s, store, sent } = session(new Response('{"error":{"message":"no key"}}', { status: 401 }));
  const id = s.ask(null, "Hi");
  await ended(store, id);
  expect(store.get().askKey).toBe(true);
  await s.useKey("sk-1", id);
  await ended(store, id);
  expect(sent.at(-1)).toMatchObject({ path: "v1/chat/completions" });
  expect(sent.at(-1)?.headers.get("Authorization")).toBe("Bearer sk-1");
});

test("stop keeps what came and marks it", async () => {
  const { session: s, store } = session(piece({ content: "So far" }), "");
  const id = s.ask(null, "Hi");
  await vi.waitFor(() => expect(store.get().chats[id]?.messages.at(-1)?.content).toBe("So far"), 2000);
  s.stop(id);
  const answer = await ended(store, id);
  expect(answer).toMatchObject({ status: "stopped", content: "So far" });
  expect(answer.fault).toBeUndefined();
});

test("the request leaves out reasoning, empty answers and what was not set", () => {
  const answer = { id: "a", role: "assistant", content: "Yes.", reasoning: "Hm.", status: "done", model: "m" } as const;
  const history: Message[] = [{ id: "q", role: "user", content: "Hi" }, answer, { ...answer, content: "" }];
  const plain = requestBody(history, { id: "m" }, DEFAULTS);
  expect(plain).toEqual({
    model: "m",
    messages: [{ role: "user", content: "Hi" }, { role: "assistant", content: "Yes." }],
    stream: true,
    stream_options: { include_usage: true },
  });
  const set = requestBody(history, MODEL, { ...DEFAULTS, system: "Be brief.", temperature: 0, maxTokens: 9, thinking: true });
  expect(set).toMatchObject({ temperature: 0, max_tokens: 9, thinking: { type: "enabled" } });
  expect(set.messages[0]).toEqual({ role: "system", content: "Be brief." });
});

test("vLLM's name for reasoning is understood", () => {
  expect([...pieces('{"choices":[{"delta":{"reasoning":"Hm"}}]}')]).toEqual([{ kind: "reasoning", text: "Hm" }]);
});
