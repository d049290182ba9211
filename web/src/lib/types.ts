/** The server's words (the chats API, docs/chat.md), as far as the page uses them. */

export type Status = "running" | "done" | "stopped" | "length" | "cut" | "error" | "waiting";

export interface Settings {
  model: string;
  thinking: boolean;
  search: boolean;
  system: string;
  temperature: number | null;
  top_p: number | null;
  max_tokens: number | null;
}

export interface FileInfo {
  id: string;
  name: string;
  type: string;
  bytes: number;
  chars: number;
  tokens: number;
  truncated: boolean;
  kind: "text" | "code" | "pdf";
}

export interface Usage {
  prompt_tokens: number;
  cached_tokens: number;
  completion_tokens: number;
  reasoning_tokens: number;
  tokens_per_s: number | null;
}

export interface Source {
  n: number;
  url: string;
  title: string;
  site: string;
  date: string | null;
  passage: string;
  /** The page could not be read: the passage is the search provider's own summary. */
  partial?: boolean;
}

export interface Search {
  queries: string[];
  sources: Source[];
  failed: string | null;
  done?: boolean;
  problems?: { where: string; message: string }[];
}

export type Phase = "queries" | "fetching" | "reading" | "done";

/** One cited sentence: `start` and `end` count JavaScript's string units in the answer. */
export interface Check {
  start: number;
  end: number;
  citations: number[];
  found: boolean;
  reason: string;
  missing?: string[];
}

export interface Message {
  id: string;
  chat: string;
  parent: string | null;
  role: "user" | "assistant";
  created: number;
  content: string;
  files: FileInfo[];
  thinking: string | null;
  thinking_s: number | null;
  thinking_tokens: number | null;
  status: Status;
  error: { message: string; code?: string | null } | null;
  model: string | null;
  settings: Partial<Settings> | null;
  usage: Usage | null;
  search: Search | null;
  checks: Check[] | null;
  /** Set by the page alone: where the search stands, and when it first saw the thought (ms). */
  phase?: Phase;
  thinkingSince?: number;
  /** Set by the page alone: the server has not taken this message (it can be sent again). */
  unsent?: boolean;
}

export interface Summary {
  id: string;
  title: string;
  pinned: boolean;
  created: number;
  updated: number;
  model: string | null;
  running?: boolean;
  match?: { text: string; ranges: [number, number][]; message: string | null };
}

export interface ChatInfo {
  id: string;
  title: string;
  pinned: boolean;
  created: number;
  updated: number;
  settings: Settings;
  head: string | null;
  draft: string;
}

export interface FullChat extends ChatInfo {
  messages: Message[];
}

export interface Model {
  id: string;
  context_length: number;
  thinking: boolean;
  thinking_mode?: "none" | "switch" | "always";
  max_output: number;
}

/** US dollars for a million tokens. */
export interface Price {
  name: string;
  input_miss: number;
  input_hit: number;
  output: number;
}

export interface Setup {
  models: Model[];
  default_model: string | null;
  search: { available: boolean; provider: string | null; local_index: boolean };
  prices: Price[];
  limits: { file_bytes: number; files_per_message: number; content_chars: number };
  upload_types: string[];
}

export type ChatEvent =
  | { type: "state" | "end"; message: Message }
  | { type: "search"; search: Search; phase: Phase }
  | { type: "thinking" | "text"; text: string }
  | { type: "usage"; usage: Usage }
  | { type: "checks"; checks: Check[] };

export interface Fault {
  message: string;
  status?: number;
}

/** Where the search of an answer stands; what a reload finds under way says only whether it is done. */
export function phaseOf(message: Message): Phase {
  if (!message.search || message.search.done || !isRunning(message)) return "done";
  return message.phase ?? (message.search.done === undefined ? "done" : message.search.queries.length ? "fetching" : "queries");
}

export const isRunning = (m: Pick<Message, "status">): boolean => m.status === "running" || m.status === "waiting";
