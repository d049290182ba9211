/** The chats API. Addresses are relative: the page is served by the API's own server. */
import { SseDecoder } from "./sse";
import type { ChatEvent, ChatInfo, Fault, FileInfo, FullChat, Message, Settings, Setup, Summary } from "./types";

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

  /** Nothing was answered: the network or the server is away, and asking again may help. */
  get away(): boolean {
    return this.status === undefined || this.status === 502 || this.status === 503 || this.status === 504;
  }
}

type Body = Record<string, unknown>;

export interface Question {
  id: string;
  parent: string | null;
  content: string;
  files: string[];
  answer: { id: string; settings?: Settings };
}

export class Api {
  constructor(private readonly key: () => string | null) {}

  setup = (): Promise<Setup> => this.json("chats/setup");

  list(query: string, before: string | null): Promise<{ chats: Summary[]; next: string | null }> {
    const asked = new URLSearchParams({ limit: "50" });
    if (query) asked.set("query", query);
    if (before) asked.set("before", before);
    return this.json(`chats?${asked}`);
  }

  chat = (id: string): Promise<FullChat> => this.json(at(id));
  create = (body: { id: string; settings: Settings }): Promise<ChatInfo> => this.json("chats", "POST", body);
  change = (id: string, body: Body, keepalive = false): Promise<ChatInfo> => this.json(at(id), "PATCH", body, keepalive);
  remove = async (id: string): Promise<void> => void (await this.request(at(id), { method: "DELETE" }));
  restore = (exported: unknown): Promise<FullChat> => this.json("chats/import", "POST", exported as Body);

  ask = (chat: string, body: Question): Promise<{ question: Message; answer: Message }> =>
    this.json(at(chat, "messages"), "POST", { ...body });
  answer = (chat: string, body: { id: string; parent: string; settings?: Settings }): Promise<Message> =>
    this.json(at(chat, "answers"), "POST", body);
  goOn = (chat: string, message: string, body: { id?: string; thinking?: string; content?: string }): Promise<Message> =>
    this.json(at(chat, "messages", message, "continue"), "POST", body);
  stop = (chat: string, message: string, thinking: boolean): Promise<Message> =>
    this.json(at(chat, "messages", message, "stop"), "POST", thinking ? { thinking } : {});

  /** A download: its file name and its content. */
  async exported(id: string, format: "markdown" | "json"): Promise<{ name: string; body: Blob }> {
    const response = await this.request(`${at(id, "export")}?format=${format}`);
    return { name: fileName(response) ?? `${id}.${format === "json" ? "json" : "md"}`, body: await response.blob() };
  }

  async upload(file: File, signal: AbortSignal): Promise<FileInfo> {
    const form = new FormData();
    form.append("file", file, file.name);
    return (await this.request("chats/files", { method: "POST", body: form, signal })).json();
  }

  removeFile = async (id: string): Promise<void> => void (await this.request(at("files", id), { method: "DELETE" }));

  /** What happens to a message from now on; the first event is its whole state. Ends when the server ends it,
   *  which without an "end" event means that the connection broke. Raises ApiError. */
  async *events(chat: string, message: string, after: string, signal: AbortSignal): AsyncGenerator<{ id: string; event: ChatEvent }> {
    const query = after ? `?after=${encodeURIComponent(after)}` : "";
    const response = await this.request(at(chat, "messages", message, "events") + query, { signal });
    const reader = response.body?.getReader();
    if (!reader) return;
    const decoder = new SseDecoder();
    for (;;) {
      const chunk = await reader.read().catch(() => null);
      if (chunk === null || chunk.done) return;
      for (const { id, data } of decoder.push(chunk.value)) {
        const event = parse(data);
        if (event) yield { id, event };
      }
    }
  }

  private async json<T>(path: string, method = "GET", body?: Body | object, keepalive = false): Promise<T> {
    const init: RequestInit = { method, keepalive };
    if (body !== undefined) Object.assign(init, { headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    return (await this.request(path, init)).json();
  }

  private async request(path: string, init: RequestInit = {}): Promise<Response> {
    const headers = new Headers(init.headers);
    const key = this.key();
    if (key) headers.set("Authorization", `Bearer ${key}`);
    let response: Response;
    try {
      response = await fetch(path, { ...init, headers });
    } catch (error) {
      if (init.signal?.aborted) throw error;
      throw new ApiError("");
    }
    if (!response.ok) throw new ApiError(await errorMessage(response), response.status);
    return response;
  }
}

const at = (...parts: string[]): string => ["chats", ...parts.map(encodeURIComponent)].join("/");

function parse(data: string): ChatEvent | null {
  try {
    return JSON.parse(data) as ChatEvent;
  } catch {
    return null;
  }
}

async function errorMessage(response: Response): Promise<string> {
  try {
    const { error } = await response.json();
    if (typeof error?.message === "string" && error.message) return error.message;
  } catch {
    // Not JSON: a proxy's page, perhaps.
  }
  return `HTTP ${response.status}`;
}

/** The name in Content-Disposition, in either of its two spellings. */
export function fileName(response: Pick<Response, "headers">): string | null {
  const header = response.headers.get("Content-Disposition") ?? "";
  const long = /filename\*=(?:UTF-8|utf-8)''([^;]+)/.exec(header)?.[1];
  try {
    if (long) return decodeURIComponent(long.trim());
  } catch {
    // Not percent-encoded after all.
  }
  return /filename="?([^";]+)"?/.exec(header)?.[1]?.trim() ?? null;
}
