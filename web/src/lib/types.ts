/** What the page keeps: chats, their messages, a person's settings. */

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  prompt_cache_hit_tokens?: number;
  prompt_cache_miss_tokens?: number;
  completion_tokens_details?: { reasoning_tokens?: number };
}

/** The usage object if its two totals are there; servers and old storage may hold anything. */
export function asUsage(raw: unknown): Usage | null {
  const usage = raw as Partial<Usage> | null | undefined;
  const whole = typeof usage?.prompt_tokens === "number" && typeof usage.completion_tokens === "number";
  return whole ? (usage as Usage) : null;
}

export interface Model {
  id: string;
  max_model_len?: number;
  thinking?: boolean;
}

export interface Fault {
  message: string;
  status?: number;
}

/** streaming: being written; done: a finish reason and [DONE] came; stopped: by the person;
 *  interrupted: the stream broke off after something had come; error: the server said no. */
export type Status = "streaming" | "done" | "stopped" | "interrupted" | "error";

export interface Question {
  id: string;
  role: "user";
  content: string;
}

export interface Answer {
  id: string;
  role: "assistant";
  content: string;
  reasoning: string;
  status: Status;
  model: string;
  /** When the first reasoning arrived, and how long it took until the answer's first word, in ms. */
  thinkingSince?: number;
  thinkingMs?: number;
  /** From the first token to the last, in ms. */
  decodeMs?: number;
  usage?: Usage;
  finishReason?: string;
  fault?: Fault;
}

export type Message = Question | Answer;

export interface Chat {
  id: string;
  title: string;
  updatedAt: number;
  messages: Message[];
}

export type Theme = "light" | "dark" | null;

/** `null` leaves the choice to the server (temperature, maxTokens) or to the system (theme). */
export interface Settings {
  temperature: number | null;
  maxTokens: number | null;
  system: string;
  thinking: boolean;
  model: string | null;
  theme: Theme;
  sidebar: boolean;
}

export const DEFAULTS: Settings = {
  temperature: null,
  maxTokens: null,
  system: "",
  thinking: false,
  model: null,
  theme: null,
  sidebar: true,
};
