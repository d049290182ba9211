/** The state of the page and the pure functions that change it. Nothing here touches the network, the
 *  clock or the storage; messages are never mutated, so a message that did not change is not drawn again. */
import { titleOf } from "./text";
import { type Answer, type Chat, DEFAULTS, type Fault, type Message, type Model, type Question, type Settings } from "./types";

export interface State {
  chats: Record<string, Chat>;
  settings: Settings;
  models: Model[];
  modelsFault: Fault | null;
  key: string | null;
  /** The server wants a key: the dialog is open. */
  askKey: boolean;
  storageFull: boolean;
  /** The chat deleted last, for as long as it can be brought back. */
  deleted: Chat | null;
}

export const EMPTY: State = {
  chats: {},
  settings: DEFAULTS,
  models: [],
  modelsFault: null,
  key: null,
  askKey: false,
  storageFull: false,
  deleted: null,
};

export type Action =
  | { type: "ask"; chatId: string; question: Question; answer: Answer; at: number }
  | { type: "edit"; chatId: string; questionId: string; content: string; answer: Answer; at: number }
  | { type: "again"; chatId: string; answer: Answer; at: number }
  | { type: "append"; chatId: string; answerId: string; reasoning: string; content: string; at: number }
  | { type: "finish"; chatId: string; answerId: string; result: Partial<Answer>; at: number }
  | { type: "delete"; chatId: string }
  | { type: "put"; chat: Chat }
  | { type: "settings"; settings: Partial<Settings> }
  | { type: "set"; values: Partial<Omit<State, "chats" | "settings">> };

export function reduce(state: State, action: Action): State {
  switch (action.type) {
    case "ask": {
      const chat = state.chats[action.chatId] ?? newChat(action.chatId, action.question.content);
      return put(state, chat, [...chat.messages, action.question, action.answer], action.at);
    }
    case "edit":
      return change(state, action.chatId, (chat) => {
        const index = chat.messages.findIndex((m) => m.id === action.questionId && m.role === "user");
        if (index < 0) return state;
        const question: Question = { id: action.questionId, role: "user", content: action.content };
        const named = index === 0 ? { ...chat, title: titleOf(action.content) } : chat;
        return put(state, named, [...chat.messages.slice(0, index), question, action.answer], action.at);
      });
    case "again":
      return change(state, action.chatId, (chat) => {
        const last = chat.messages.at(-1);
        const kept = last?.role === "assistant" ? chat.messages.slice(0, -1) : chat.messages;
        return put(state, chat, [...kept, action.answer], action.at);
      });
    case "append":
      return answered(state, action.chatId, action.answerId, (answer) => append(answer, action));
    case "finish":
      return answered(state, action.chatId, action.answerId, (answer) => ({
        ...thoughtUntil(answer, action.at),
        ...action.result,
      }));
    case "delete":
      return change(state, action.chatId, (chat) => {
        const { [action.chatId]: _, ...chats } = state.chats;
        return { ...state, chats, deleted: chat };
      });
    case "put":
      return {
        ...state,
        chats: { ...state.chats, [action.chat.id]: action.chat },
        deleted: state.deleted?.id === action.chat.id ? null : state.deleted,
      };
    case "settings":
      return { ...state, settings: { ...state.settings, ...action.settings } };
    case "set":
      return { ...state, ...action.values };
  }
}

function newChat(id: string, firstWords: string): Chat {
  return { id, title: titleOf(firstWords), updatedAt: 0, messages: [] };
}

function change(state: State, chatId: string, how: (chat: Chat) => State): State {
  const chat = state.chats[chatId];
  return chat ? how(chat) : state;
}

function put(state: State, chat: Chat, messages: Message[], at: number): State {
  return { ...state, chats: { ...state.chats, [chat.id]: { ...chat, messages, updatedAt: at } } };
}

function answered(state: State, chatId: string, answerId: string, how: (answer: Answer) => Answer): State {
  return change(state, chatId, (chat) => {
    const messages = chat.messages.map((m) => (m.id === answerId && m.role === "assistant" ? how(m) : m));
    return put(state, chat, messages, chat.updatedAt);
  });
}

function append(answer: Answer, piece: { reasoning: string; content: string; at: number }): Answer {
  let next: Answer = {
    ...answer,
    reasoning: answer.reasoning + piece.reasoning,
    content: answer.content + piece.content,
  };
  if (piece.reasoning && next.thinkingSince === undefined) next.thinkingSince = piece.at;
  if (piece.content) next = thoughtUntil(next, piece.at);
  return next;
}

function thoughtUntil(answer: Answer, at: number): Answer {
  if (answer.thinkingSince === undefined || answer.thinkingMs !== undefined) return answer;
  return { ...answer, thinkingMs: at - answer.thinkingSince };
}

/** Newest first. */
export function sortedChats(state: State): Chat[] {
  return Object.values(state.chats).sort((a, b) => b.updatedAt - a.updatedAt);
}

/** The chosen model if the server still has it, else its first. */
export function currentModel(state: State): Model | undefined {
  return state.models.find((m) => m.id === state.settings.model) ?? state.models[0];
}

export interface Store {
  get(): State;
  dispatch(action: Action): void;
  subscribe(listener: () => void): () => void;
}

export function createStore(initial: State): Store {
  let state = initial;
  const listeners = new Set<() => void>();
  return {
    get: () => state,
    dispatch(action) {
      const next = reduce(state, action);
      if (next === state) return;
      state = next;
      listeners.forEach((listener) => listener());
    },
    subscribe(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
  };
}
