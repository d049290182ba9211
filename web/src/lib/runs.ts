/** The running answers that the page follows, at most one stream for each. */
import type { Api, ApiError } from "./api";
import { follow, type Following } from "./follow";
import { after, messageOf, type Store, withMessages } from "./store";
import { isRunning, type Message } from "./types";

export type Follower = (api: Api, chat: string, message: string, on: Following) => () => void;

export class Runs {
  private readonly streams = new Map<string, { chat: string; stop: () => void }>();

  constructor(
    private readonly api: Api,
    private readonly store: Store,
    private readonly finished: () => void,
    private readonly follower: Follower = follow,
  ) {}

  follow(chat: string, id: string): void {
    if (this.streams.has(id)) return;
    const away = (offline: boolean) => this.store.get().offline !== offline && this.store.set({ offline });
    const stop = this.follower(this.api, chat, id, {
      events: (events) =>
        this.store.update((s) => {
          const message = messageOf(s, chat, id);
          return message ? withMessages(s, chat, [after(message, events, Date.now())]) : s;
        }),
      away,
      done: (error) => this.done(chat, id, error),
    });
    this.streams.set(id, { chat, stop });
  }

  /** Takes the server's word that an answer has ended. */
  end(chat: string, message: Message): void {
    this.streams.get(message.id)?.stop();
    this.streams.delete(message.id);
    this.store.update((s) => withMessages(s, chat, [message]));
    this.finished();
  }

  forget(chat: string): void {
    for (const [id, stream] of this.streams) {
      if (stream.chat !== chat) continue;
      stream.stop();
      this.streams.delete(id);
    }
  }

  private done(chat: string, id: string, error: ApiError | null): void {
    this.streams.delete(id);
    if (this.store.get().offline) this.store.set({ offline: false });
    const message = messageOf(this.store.get(), chat, id);
    if (error && message && isRunning(message)) {
      const ended: Message = { ...message, status: "error", error: { message: error.message, code: String(error.status ?? "") } };
      this.store.update((s) => withMessages(s, chat, [ended]));
      if (error.status === 401) this.store.set({ askKey: true });
    }
    this.finished();
  }
}
