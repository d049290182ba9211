/** New ids, new messages, and what a new conversation starts with. */
import type { Message, Settings } from "./types";

/** Not crypto.randomUUID: it is missing on plain http beyond localhost. */
export const newId = (): string =>
  Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) => b.toString(16).padStart(2, "0")).join("");

/** The choices that the next new conversation inherits; a system prompt or parameters stay with their own. */
export function lasting({ model, thinking, search }: Partial<Settings>): Partial<Settings> {
  return { ...(model !== undefined && { model }), ...(thinking !== undefined && { thinking }), ...(search !== undefined && { search }) };
}

export function blank(chat: string, parent: string | null, role: Message["role"], settings: Settings, values: Partial<Message>): Message {
  return {
    id: newId(),
    chat,
    parent,
    role,
    created: Date.now() / 1000,
    content: "",
    files: [],
    thinking: null,
    thinking_s: null,
    thinking_tokens: null,
    status: role === "user" ? "done" : "running",
    error: null,
    model: role === "user" ? null : settings.model,
    settings: role === "user" ? null : settings,
    usage: null,
    search: null,
    checks: null,
    ...values,
  };
}

export function blankAgain(message: Message): Message {
  const { unsent: _, ...rest } = message;
  return { ...rest, error: null, status: "done" };
}

/** The first words of a message, whole, in at most `limit` characters: until the server has made its own. */
export function titleOf(message: string, limit = 60): string {
  const line = message.trim().replace(/\s+/g, " ");
  if (line.length <= limit) return line;
  const cut = line.slice(0, limit + 1);
  const space = cut.lastIndexOf(" ");
  const words = space > limit / 3 ? cut.slice(0, space) : Array.from(line).slice(0, limit).join("");
  return `${words.replace(/[\s.,;:!?–-]+$/, "")}…`;
}
