/** What a person does, as methods: ask, stop, edit, try again. Holds the running requests, one per chat;
 *  a chat goes on being answered while another is looked at. All state is in the store. */
import { ApiError, Interrupted, listModels, requestBody, streamChat } from "./api";
import { perFrame } from "./frames";
import { currentModel, type Store } from "./store";
import type { Answer, Chat, Fault } from "./types";

// Not crypto.randomUUID: it is missing on plain http beyond localhost.
const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(8)), (b) => b.toString(16).padStart(2, "0")).join("");

const NO_MODEL: Fault = { message: "The server offers no model." };

export class Session {
  private readonly running = new Map<string, AbortController>();

  constructor(readonly store: Store) {}

  /** Asks in a chat, or in a new one. Returns its id. */
  ask(chatId: string | null, content: string): string {
    const id = chatId ?? newId();
    const answer = this.blank();
    const question = { id: newId(), role: "user" as const, content };
    this.store.dispatch({ type: "ask", chatId: id, question, answer, at: Date.now() });
    void this.run(id, answer);
    return id;
  }

  /** Replaces a question; what followed it is gone, a new answer comes. */
  edit(chatId: string, questionId: string, content: string): void {
    const answer = this.blank();
    this.store.dispatch({ type: "edit", chatId, questionId, content, answer, at: Date.now() });
    void this.run(chatId, answer);
  }

  /** Answers the last question once more. */
  again(chatId: string): void {
    const answer = this.blank();
    this.store.dispatch({ type: "again", chatId, answer, at: Date.now() });
    void this.run(chatId, answer);
  }

  /** Aborting the request tells the server to stop generating. */
  stop(chatId: string): void {
    this.running.get(chatId)?.abort();
  }

  delete(chatId: string): void {
    this.stop(chatId);
    this.store.dispatch({ type: "delete", chatId });
  }

  restore(chat: Chat): void {
    const messages = chat.messages.map((m) =>
      m.role === "assistant" && m.status === "streaming" ? { ...m, status: "stopped" as const } : m,
    );
    this.store.dispatch({ type: "put", chat: { ...chat, messages } });
  }

  async loadModels(): Promise<void> {
    try {
      const models = await listModels(this.store.get().key);
      this.store.dispatch({ type: "set", values: { models, modelsFault: models.length ? null : NO_MODEL } });
    } catch (error) {
      this.store.dispatch({ type: "set", values: { modelsFault: this.faultOf(error) } });
    }
  }

  /** Keeps the key and repeats what failed for want of it. */
  async useKey(key: string | null, chatId: string | null): Promise<void> {
    this.store.dispatch({ type: "set", values: { key, askKey: false } });
    await this.loadModels();
    const last = chatId === null ? undefined : this.store.get().chats[chatId]?.messages.at(-1);
    if (key && chatId !== null && last?.role === "assistant" && last.fault?.status === 401) this.again(chatId);
  }

  private blank(): Answer {
    const model = currentModel(this.store.get())?.id ?? "";
    return { id: newId(), role: "assistant", content: "", reasoning: "", status: "streaming", model };
  }

  private async run(chatId: string, answer: Answer): Promise<void> {
    this.stop(chatId);
    const abort = new AbortController();
    this.running.set(chatId, abort);
    const result = await this.stream(chatId, answer.id, abort.signal);
    if (this.running.get(chatId) === abort) this.running.delete(chatId);
    this.store.dispatch({ type: "finish", chatId, answerId: answer.id, result, at: Date.now() });
  }

  /** Feeds the answer until its stream ends, in whatever way. Never throws. */
  private async stream(chatId: string, answerId: string, signal: AbortSignal): Promise<Partial<Answer>> {
    const result: Partial<Answer> = { status: "done" };
    const news = { reasoning: "", content: "" };
    const frames = perFrame(() => {
      this.store.dispatch({ type: "append", chatId, answerId, ...news, at: Date.now() });
      news.reasoning = news.content = "";
    });
    let firstAt: number | undefined;
    try {
      if (!currentModel(this.store.get())) await this.loadModels();
      const state = this.store.get();
      const model = currentModel(state);
      result.model = model?.id ?? "";
      if (!model) throw new ApiError(state.modelsFault?.message ?? NO_MODEL.message, state.modelsFault?.status);
      const history = (state.chats[chatId]?.messages ?? []).slice(0, -1);
      for await (const piece of streamChat(requestBody(history, model, state.settings), state.key, signal)) {
        if (piece.kind === "finish") result.finishReason = piece.reason;
        else if (piece.kind === "usage") result.usage = piece.usage;
        else {
          firstAt ??= performance.now();
          result.decodeMs = performance.now() - firstAt;
          news[piece.kind] += piece.text;
          frames.request();
        }
      }
    } catch (error) {
      if (signal.aborted) result.status = "stopped";
      else {
        result.status = error instanceof Interrupted ? "interrupted" : "error";
        result.fault = this.faultOf(error);
      }
    }
    frames.flush();
    return result;
  }

  /** What to tell the person; opens the key dialog if that is what is missing. */
  private faultOf(error: unknown): Fault {
    const fault = error instanceof ApiError ? error.fault : { message: error instanceof Error ? error.message : String(error) };
    if (fault.status === 401) this.store.dispatch({ type: "set", values: { askKey: true } });
    return fault;
  }
}
