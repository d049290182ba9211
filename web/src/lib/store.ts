/** The state of the page and the pure functions that change it. Nothing here touches the network, the clock or
 *  the browser; a message that did not change stays the same object, so it is not drawn again. */
import { type Messages, type Shape, shapeOf } from "./tree";
import { type ChatEvent, type ChatInfo, type Fault, type FileInfo, type FullChat, isRunning, type Message, type Settings, type Setup, type Summary } from "./types";

/** `null` follows the system (theme, language) or the first of the list (price). */
export interface Prefs {
  theme: "light" | "dark" | null;
  language: "en" | "zh" | null;
  sidebar: boolean;
  price: string | null;
  /** The settings that a new conversation starts with. */
  settings: Partial<Settings>;
}

export const DEFAULTS: Prefs = { theme: null, language: null, sidebar: true, price: null, settings: {} };

export interface Thread extends Shape {
  info: ChatInfo;
  messages: Messages;
}

/** A file in the composer: on its way, refused, or taken by the server. */
export interface Attachment {
  key: string;
  name: string;
  info?: FileInfo;
  fault?: string;
}

export interface Draft {
  text: string;
  files: Attachment[];
}

export const NO_DRAFT: Draft = { text: "", files: [] };

/** What is open beside the conversation. */
export type Panel =
  | { kind: "sources"; message: string; n: number | null }
  | { kind: "preview"; language: string; code: string }
  | null;

export type Toast = { text: string; action?: { label: string; run: () => void } };

export interface State {
  setup: Setup | null;
  fault: Fault | null;
  key: string | null;
  /** The server wants a key: the dialog is open. */
  askKey: boolean;
  prefs: Prefs;
  list: { chats: Summary[]; next: string | null; query: string; loaded: boolean };
  threads: Readonly<Record<string, Thread>>;
  drafts: Readonly<Record<string, Draft>>;
  panel: Panel;
  dialog: "palette" | "keys" | null;
  /** The question or the thought (as `thought:ID`) that is being edited. */
  editing: string | null;
  toast: Toast | null;
  /** A message that the search has found: the conversation shows its branch and scrolls to it. */
  reveal: { chat: string; message: string } | null;
  /** The event stream of a running answer has been away for a while. */
  offline: boolean;
}

export const EMPTY: State = {
  setup: null,
  fault: null,
  key: null,
  askKey: false,
  prefs: DEFAULTS,
  list: { chats: [], next: null, query: "", loaded: false },
  threads: {},
  drafts: {},
  panel: null,
  dialog: null,
  editing: null,
  toast: null,
  reveal: null,
  offline: false,
};

export function withThread(state: State, chat: FullChat): State {
  const { messages: all, ...info } = chat;
  const old = state.threads[chat.id];
  const messages = new Map(all.map((m) => [m.id, m]));
  // What the server has not taken yet stays visible.
  for (const message of old?.messages.values() ?? []) if (message.unsent && !messages.has(message.id)) messages.set(message.id, message);
  const thread = { info, messages, ...shapeOf(messages, info.head) };
  return { ...state, threads: { ...state.threads, [chat.id]: thread } };
}

const changed = (state: State, id: string, change: (thread: Thread) => Thread): State => {
  const thread = state.threads[id];
  if (!thread) return state;
  const next = change(thread);
  return next === thread ? state : { ...state, threads: { ...state.threads, [id]: next } };
};

/** Changes what is known of a chat; its title and pin also in the list. */
export function withInfo(state: State, id: string, values: Partial<ChatInfo>): State {
  const next = changed(state, id, (thread) => {
    const info = { ...thread.info, ...values };
    return values.head === undefined ? { ...thread, info } : { ...thread, info, ...shapeOf(thread.messages, info.head) };
  });
  const { title, pinned, updated } = values;
  if (title === undefined && pinned === undefined && updated === undefined) return next;
  const chats = next.list.chats.map((c) =>
    c.id === id ? { ...c, title: title ?? c.title, pinned: pinned ?? c.pinned, updated: updated ?? c.updated } : c,
  );
  return { ...next, list: { ...next.list, chats } };
}

/** Puts messages into a chat: new ones, or in place of those with their ids. `head` moves the path. */
export function withMessages(state: State, id: string, news: Message[], head?: string): State {
  return changed(state, id, (thread) => {
    const messages = new Map(thread.messages);
    let grown = head !== undefined;
    for (const message of news) {
      const old = messages.get(message.id);
      if (old?.parent !== message.parent) grown = true;
      messages.set(message.id, message);
    }
    if (!grown) return { ...thread, messages };
    const info = head === undefined ? thread.info : { ...thread.info, head };
    return { ...thread, info, messages, ...shapeOf(messages, info.head) };
  });
}

export const messageOf = (state: State, chat: string, id: string): Message | undefined => state.threads[chat]?.messages.get(id);

/** When a thought that still runs began, in ms: by the server's clock where it tells, since the answer's beginning at most. */
function thinkingSince(old: Message, told: Message, now: number): number | undefined {
  if (isRunning(told) && told.thinking_s !== null && !told.content) return now - told.thinking_s * 1000;
  return old.thinkingSince ?? (told.thinking ? told.created * 1000 : undefined);
}

/** A message after some of its events, which came within one frame. `now` is in ms. */
export function after(message: Message, events: ChatEvent[], now: number): Message {
  const next = { ...message };
  for (const event of events) {
    if (event.type === "state" || event.type === "end") {
      const since = thinkingSince(next, event.message, now);
      const { phase } = next;
      for (const key of Object.keys(next)) delete (next as Record<string, unknown>)[key];
      Object.assign(next, event.message);
      if (since !== undefined) next.thinkingSince = Math.min(since, now);
      if (phase && event.type === "state") next.phase = phase;
    } else if (event.type === "thinking") {
      next.thinkingSince ??= now;
      next.thinking = (next.thinking ?? "") + event.text;
    } else if (event.type === "text") {
      if (next.thinking !== null && !next.content) next.thinking_s = (now - (next.thinkingSince ?? now)) / 1000;
      next.content += event.text;
    } else if (event.type === "search") {
      next.search = event.search;
      next.phase = event.phase;
    } else if (event.type === "usage") next.usage = event.usage;
    else if (event.type === "checks") next.checks = event.checks;
  }
  return next;
}

/** Pinned ones first, then the newest. */
export const inOrder = (chats: Summary[]): Summary[] =>
  [...chats].sort((a, b) => Number(b.pinned) - Number(a.pinned) || b.updated - a.updated);

/** What a conversation is asked with: its own settings, else those a new one starts with. */
export function settingsOf(state: State, chat: string | null): Settings {
  const models = state.setup?.models ?? [];
  const wanted: Partial<Settings> = (chat !== null && state.threads[chat]?.info.settings) || state.prefs.settings;
  const known = models.find((m) => m.id === wanted.model) ?? models.find((m) => m.id === state.setup?.default_model) ?? models[0];
  return {
    thinking: wanted.thinking ?? false,
    search: (wanted.search ?? false) && state.setup?.search.available === true,
    system: wanted.system ?? "",
    temperature: wanted.temperature ?? null,
    top_p: wanted.top_p ?? null,
    max_tokens: wanted.max_tokens ?? null,
    model: known?.id ?? "",
  };
}

export interface Store {
  get(): State;
  update(change: (state: State) => State): void;
  set(values: Partial<State>): void;
  subscribe(listener: () => void): () => void;
}

export function createStore(initial: State): Store {
  let state = initial;
  const listeners = new Set<() => void>();
  const update = (change: (state: State) => State) => {
    const next = change(state);
    if (next === state) return;
    state = next;
    listeners.forEach((listener) => listener());
  };
  return {
    get: () => state,
    update,
    set: (values) => update((s) => ({ ...s, ...values })),
    subscribe(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
  };
}
