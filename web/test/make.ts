import type { ChatInfo, Message, Settings } from "../src/lib/types";

export const SETTINGS: Settings = { model: "nano", thinking: false, search: false, system: "", temperature: null, top_p: null, max_tokens: null };

export function message(values: Partial<Message>): Message {
  return {
    id: "m",
    chat: "c",
    parent: null,
    role: "assistant",
    created: 1,
    content: "",
    files: [],
    thinking: null,
    thinking_s: null,
    thinking_tokens: null,
    status: "done",
    error: null,
    model: "nano",
    settings: null,
    usage: null,
    search: null,
    checks: null,
    ...values,
  };
}

export const info = (values: Partial<ChatInfo> = {}): ChatInfo => ({
  id: "c",
  title: "A chat",
  pinned: false,
  created: 1,
  updated: 1,
  settings: SETTINGS,
  head: null,
  draft: "",
  ...values,
});
