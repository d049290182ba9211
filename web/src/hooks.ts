/** React's side of the session: selecting state, the route in the hash, scrolling that follows. */
import { createContext, type RefObject, useContext, useEffect, useRef, useState, useSyncExternalStore } from "react";
import type { Session } from "./lib/session";
import type { State } from "./lib/store";

export const SessionContext = createContext<Session | null>(null);

export function useSession(): Session {
  const session = useContext(SessionContext);
  if (!session) throw new Error("no session above this component");
  return session;
}

/** Draws again when `select`'s answer changes. It must return something that is in the state. */
export function useSelect<T>(select: (state: State) => T): T {
  const { store } = useSession();
  return useSyncExternalStore(store.subscribe, () => select(store.get()));
}

const hashChanges = (listener: () => void) => {
  window.addEventListener("hashchange", listener);
  return () => window.removeEventListener("hashchange", listener);
};

/** The chat that the address names (`#/c/ID`), or null for a new one (`#/`). */
export function useRoute(): string | null {
  return useSyncExternalStore(hashChanges, () => /^#\/c\/(\w+)$/.exec(location.hash)?.[1] ?? null);
}

export const routeTo = (chatId: string | null): string => (chatId === null ? "#/" : `#/c/${chatId}`);

export function go(chatId: string | null): void {
  location.hash = routeTo(chatId);
}

const NEAR_PX = 48;

/** Keeps a scrolling box at its end while its content grows, until the person scrolls up. `key` names
 *  what is shown: when it changes, the box starts at its end again. */
export function useFollow(key: unknown): {
  box: RefObject<HTMLDivElement | null>;
  content: RefObject<HTMLDivElement | null>;
  following: boolean;
  toEnd: (smooth?: boolean) => void;
} {
  const box = useRef<HTMLDivElement>(null);
  const content = useRef<HTMLDivElement>(null);
  const follow = useRef(true);
  const [following, setFollowing] = useState(true);

  const set = (value: boolean) => {
    follow.current = value;
    setFollowing(value);
  };
  const toEnd = (smooth = false) => {
    set(true);
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    box.current?.scrollTo({ top: box.current.scrollHeight, behavior: smooth && !calm ? "smooth" : "instant" });
  };

  useEffect(() => {
    const el = box.current;
    if (!el || !content.current) return;
    let top = el.scrollTop;
    const scrolled = () => {
      const left = el.scrollHeight - el.clientHeight - el.scrollTop;
      if (left < NEAR_PX && el.scrollTop >= top) set(true);
      else if (el.scrollTop < top && left > 2) set(false); // upwards: only a person does that
      top = el.scrollTop;
    };
    const grown = new ResizeObserver(() => {
      if (follow.current) el.scrollTop = el.scrollHeight;
    });
    el.addEventListener("scroll", scrolled, { passive: true });
    grown.observe(content.current);
    grown.observe(el);
    toEnd();
    return () => {
      el.removeEventListener("scroll", scrolled);
      grown.disconnect();
    };
  }, [key]);

  return { box, content, following, toEnd };
}

/** The time, again every second while `active`. */
export function useNow(active: boolean): number {
  const [now, setNow] = useState(Date.now);
  useEffect(() => {
    if (!active) return;
    const timer = setInterval(() => setNow(Date.now()), 1000);
    return () => clearInterval(timer);
  }, [active]);
  return now;
}
