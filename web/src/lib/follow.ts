/** Follows a running answer: its events, gathered per animation frame, until its end; reconnects when the
 *  connection breaks, at once when the network or the tab comes back. The server goes on meanwhile. */
import { type Api, ApiError } from "./api";
import { perFrame } from "./frames";
import type { ChatEvent } from "./types";

export interface Following {
  events: (events: ChatEvent[]) => void;
  /** The connection is away (or back). */
  away: (away: boolean) => void;
  /** It is over: the end came, or the server refused (the message is gone, the key is wrong). */
  done: (error: ApiError | null) => void;
}

const FIRST_WAIT_MS = 300;
const LONGEST_WAIT_MS = 8000;

export function follow(api: Api, chat: string, message: string, on: Following): () => void {
  const abort = new AbortController();
  void run(api, chat, message, on, abort.signal);
  return () => abort.abort();
}

async function run(api: Api, chat: string, message: string, on: Following, signal: AbortSignal): Promise<void> {
  let after = "";
  let wait = FIRST_WAIT_MS;
  for (;;) {
    let news: ChatEvent[] = [];
    const frames = perFrame(() => {
      const now = news;
      news = [];
      if (now.length && !signal.aborted) on.events(now);
    });
    let ended = false;
    let error: unknown = null;
    try {
      for await (const { id, event } of api.events(chat, message, after, signal)) {
        if (wait !== FIRST_WAIT_MS) on.away(false);
        wait = FIRST_WAIT_MS;
        after = id || after;
        news.push(event);
        frames.request();
        ended = event.type === "end" || (event.type === "state" && !["running", "waiting"].includes(event.message.status));
      }
    } catch (caught) {
      error = caught;
    }
    frames.flush();
    if (signal.aborted) return;
    if (ended) return on.done(null);
    if (error && !(error instanceof ApiError && error.away)) return on.done(error instanceof ApiError ? error : new ApiError(String(error)));
    on.away(true);
    await pause(wait, signal);
    if (signal.aborted) return;
    wait = Math.min(wait * 2, LONGEST_WAIT_MS);
  }
}

/** Waits, but no longer than until the network or the tab is back. */
function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const end = () => {
      clearTimeout(timer);
      if (typeof window !== "undefined") window.removeEventListener("online", end);
      signal.removeEventListener("abort", end);
      resolve();
    };
    const timer = setTimeout(end, ms);
    if (typeof window !== "undefined") window.addEventListener("online", end);
    signal.addEventListener("abort", end);
  });
}
