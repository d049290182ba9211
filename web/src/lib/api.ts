/** The two calls the page makes. Addresses are relative: the page is served by the API's own server. */
import { SseDecoder } from "./sse";
import { asUsage, type Fault, type Message, type Model, type Settings, type Usage } from "./types";

export class ApiError extends Error {
  constructor(
    message: string,
    readonly status?: number,
  ) {
    super(message);
  }

  get fault(): Fault {
    return this.status === undefined ? { message: this.message } : { message: this.message, status: this.status };
  }
}

/** The stream broke off: no [DONE], or the connection was lost. What came before it stands. */
export class Interrupted extends Error {}

export type Piece =
  | { kind: "reasoning" | "content"; text: string }
  | { kind: "finish"; reason: string }
  | { kind: "usage"; usage: Usage };

export interface Body {
  model: string;
  messages: { role: string; content: string }[];
  stream: true;
  stream_options: { include_usage: true };
  thinking?: { type: "enabled" | "disabled" };
  temperature?: number;
  max_tokens?: number;
}

/** The request for the next answer. Earlier reasoning is not sent back, nor answers without a word. */
export function requestBody(history: Message[], model: Model, settings: Settings): Body {
  const said = history.filter((m) => m.role === "user" || m.content !== "");
  const messages = said.map(({ role, content }) => ({ role: role as string, content }));
  if (settings.system.trim()) messages.unshift({ role: "system", content: settings.system });
  const body: Body = { model: model.id, messages, stream: true, stream_options: { include_usage: true } };
  if (model.thinking) body.thinking = { type: settings.thinking ? "enabled" : "disabled" };
  if (settings.temperature !== null) body.temperature = settings.temperature;
  if (settings.maxTokens !== null) body.max_tokens = settings.maxTokens;
  return body;
}

async function request(path: string, key: string | null, init: RequestInit = {}): Promise<Response> {
  const headers = new Headers(init.headers);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let response: Response;
  try {
    response = await fetch(path, { ...init, headers });
  } catch (error) {
    if (init.signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (!response.ok) throw new ApiError(await errorMessage(response), response.status);
  return response;
}

async function errorMessage(response: Response): Promise<string> {
  try {
    const { error } = await response.json();
    if (typeof error?.message === "string" && error.message) return error.message;
  } catch {
    // Not JSON: a proxy's page, perhaps.
  }
  return `The server answered with status ${response.status}.`;
}

export async function listModels(key: string | null): Promise<Model[]> {
  const body = await (await request("v1/models", key)).json();
  return Array.isArray(body?.data) ? body.data : [];
}

export async function* streamChat(body: Body, key: string | null, signal: AbortSignal): AsyncGenerator<Piece> {
  const response = await request("v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of events(response, signal)) {
    if (data === "[DONE]") return;
    yield* pieces(data);
  }
  throw new Interrupted("The answer broke off before its end.");
}

async function* events(response: Response, signal: AbortSignal): AsyncGenerator<string> {
  const reader = response.body?.getReader();
  if (!reader) return;
  const decoder = new SseDecoder();
  for (;;) {
    let chunk: ReadableStreamReadResult<Uint8Array>;
    try {
      chunk = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      throw new Interrupted("The connection was lost.");
    }
    if (chunk.done) break;
    yield* decoder.push(chunk.value);
  }
  yield* decoder.end();
}

/** One chunk of the stream. Raises ApiError if it is the server's word that something failed. */
export function* pieces(data: string): Generator<Piece> {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new Interrupted("The server sent something that is not a chat stream.");
  }
  if (chunk.error) throw new ApiError(chunk.error.message || "The server failed while it was answering.");
  const choice = chunk.choices?.[0];
  const reasoning = choice?.delta?.reasoning_content ?? choice?.delta?.reasoning;
  if (reasoning) yield { kind: "reasoning", text: reasoning };
  if (choice?.delta?.content) yield { kind: "content", text: choice.delta.content };
  if (choice?.finish_reason) yield { kind: "finish", reason: choice.finish_reason };
  const usage = asUsage(chunk.usage);
  if (usage) yield { kind: "usage", usage };
}
