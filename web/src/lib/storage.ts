/** What survives a reload. One key per chat, so that one spoilt entry costs one chat and two tabs do not
 *  overwrite each other. Storage may be missing, full or hold anything: reading never throws, writing
 *  says whether it worked. */
import { EMPTY, type State } from "./store";
import { type Answer, asUsage, type Chat, DEFAULTS, type Fault, type Message, type Settings } from "./types";

const CHAT = "rorqual.chat.";
const SETTINGS = "rorqual.settings";
const KEY = "rorqual.key";

export type Disk = Pick<Storage, "getItem" | "setItem" | "removeItem" | "key" | "length">;

/** The browser's storage, or null where it is switched off (touching it then throws). */
export function browserDisk(): Disk | null {
  try {
    return window.localStorage;
  } catch {
    return null;
  }
}

export function load(disk: Disk | null): State {
  const state: State = { ...EMPTY, chats: {} };
  if (!disk) return state;
  try {
    for (let i = 0; i < disk.length; i++) {
      const name = disk.key(i);
      const chat = name?.startsWith(CHAT) ? parseChat(disk.getItem(name)) : null;
      if (chat && name === CHAT + chat.id) state.chats[chat.id] = chat;
    }
    state.settings = parseSettings(disk.getItem(SETTINGS));
    state.key = disk.getItem(KEY);
  } catch {
    // What was read so far is what there is.
  }
  return state;
}

/** Writes what differs between two states. Returns false if something did not fit. */
export function save(disk: Disk | null, before: State, after: State): boolean {
  let fits = disk !== null;
  const write = (name: string, value: string | null) => {
    try {
      if (value === null) disk?.removeItem(name);
      else disk?.setItem(name, value);
    } catch {
      fits = false;
    }
  };
  for (const id of Object.keys(before.chats)) if (!after.chats[id]) write(CHAT + id, null);
  for (const chat of Object.values(after.chats)) {
    if (before.chats[chat.id] !== chat) write(CHAT + chat.id, JSON.stringify(chat));
  }
  if (before.settings !== after.settings) write(SETTINGS, JSON.stringify(after.settings));
  if (before.key !== after.key) write(KEY, after.key);
  return fits;
}

/** The chat another tab has just written; null if the entry is no chat, or one still being written. */
export function chatFromEvent(name: string | null, value: string | null): Chat | null {
  if (!name?.startsWith(CHAT) || value === null || value.includes('"status":"streaming"')) return null;
  return parseChat(value);
}

export const deletedInEvent = (name: string | null, value: string | null): string | null =>
  name?.startsWith(CHAT) && value === null ? name.slice(CHAT.length) : null;

function parseChat(json: string | null): Chat | null {
  const raw = parse(json);
  if (!raw || typeof raw.id !== "string" || !Array.isArray(raw.messages)) return null;
  const messages = raw.messages.map(parseMessage).filter((m): m is Message => m !== null);
  if (!messages.length) return null;
  return {
    id: raw.id,
    title: typeof raw.title === "string" ? raw.title : "Untitled",
    updatedAt: typeof raw.updatedAt === "number" ? raw.updatedAt : 0,
    messages,
  };
}

function parseMessage(raw: unknown): Message | null {
  const m = raw as Partial<Message> | null;
  if (typeof m !== "object" || m === null || typeof m.id !== "string" || typeof m.content !== "string") return null;
  if (m.role === "user") return { id: m.id, role: "user", content: m.content };
  if (m.role !== "assistant") return null;
  const a = m as Partial<Record<keyof Answer, unknown>>;
  const answer: Answer = {
    id: m.id,
    role: "assistant",
    content: m.content,
    reasoning: typeof a.reasoning === "string" ? a.reasoning : "",
    model: typeof a.model === "string" ? a.model : "",
    // "streaming" means that the page was closed while it streamed: nobody is writing it any more.
    status: a.status === "done" || a.status === "stopped" || a.status === "error" ? a.status : "interrupted",
  };
  if (typeof a.thinkingSince === "number") answer.thinkingSince = a.thinkingSince;
  if (typeof a.thinkingMs === "number") answer.thinkingMs = a.thinkingMs;
  if (typeof a.decodeMs === "number") answer.decodeMs = a.decodeMs;
  if (typeof a.finishReason === "string") answer.finishReason = a.finishReason;
  const usage = asUsage(a.usage);
  if (usage) answer.usage = usage;
  const fault = a.fault as Partial<Fault> | undefined;
  if (typeof fault?.message === "string") answer.fault = { ...fault, message: fault.message };
  return answer;
}

function parseSettings(json: string | null): Settings {
  const raw = parse(json) ?? {};
  const settings: Record<string, unknown> = { ...DEFAULTS };
  const kinds: Record<keyof Settings, (v: unknown) => boolean> = {
    temperature: (v) => v === null || (typeof v === "number" && v >= 0 && v <= 2),
    maxTokens: (v) => v === null || (Number.isInteger(v) && (v as number) > 0),
    system: (v) => typeof v === "string",
    thinking: (v) => typeof v === "boolean",
    model: (v) => v === null || typeof v === "string",
    theme: (v) => v === null || v === "light" || v === "dark",
    sidebar: (v) => typeof v === "boolean",
  };
  for (const [name, fits] of Object.entries(kinds)) if (fits(raw[name])) settings[name] = raw[name];
  return settings as unknown as Settings;
}

function parse(json: string | null): Record<string, unknown> | null {
  try {
    const value = JSON.parse(json ?? "null");
    return typeof value === "object" && !Array.isArray(value) ? value : null;
  } catch {
    return null;
  }
}
