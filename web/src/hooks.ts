/** React's side of the session: selecting state, words, the route in the hash, scrolling that follows. */
import { createContext, type RefObject, useContext, useEffect, useMemo, useRef, useState, useSyncExternalStore } from "react";
import { type Language, LANGUAGES, languageOf, type Translate, translator } from "./lib/i18n";
import type { Session } from "./lib/session";
import { settingsOf, type State } from "./lib/store";
import type { Message, Settings } from "./lib/types";

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

/** What a conversation (null: the next one) is asked with. */
export function useSettings(chat: string | null): Settings {
  const own = useSelect((s) => (chat === null ? undefined : s.threads[chat]?.info.settings));
  const fresh = useSelect((s) => s.prefs.settings);
  const setup = useSelect((s) => s.setup);
  const { store } = useSession();
  return useMemo(() => settingsOf(store.get(), chat), [store, chat, own, fresh, setup]);
}

export const useMessage = (chat: string, id: string): Message | undefined => useSelect((s) => s.threads[chat]?.messages.get(id));

export const WordsContext = createContext<{ language: Language; t: Translate }>({ language: "en", t: translator("en") });
export const useWords = (): { language: Language; t: Translate } => useContext(WordsContext);
export const useT = (): Translate => useContext(WordsContext).t;

/** The chosen language, as words and on the document. */
export function useLanguage(): { language: Language; t: Translate } {
  const chosen = useSelect((s) => s.prefs.language);
  const language = languageOf(chosen, navigator.languages);
  useEffect(() => void (document.documentElement.lang = LANGUAGES[language].tag), [language]);
  return useMemo(() => ({ language, t: translator(language) }), [language]);
}

const hashChanges = (listener: () => void) => {
  window.addEventListener("hashchange", listener);
  return () => window.removeEventListener("hashchange", listener);
};

/** The chat that the address names (`#/c/ID`), or null for a new one (`#/`). */
export function useRoute(): string | null {
  return useSyncExternalStore(hashChanges, () => /^#\/c\/([\w-]{1,64})$/.exec(location.hash)?.[1] ?? null);
}

export const routeTo = (chat: string | null): string => (chat === null ? "#/" : `#/c/${chat}`);

export function go(chat: string | null): void {
  location.hash = routeTo(chat);
}

export const CALM = "(prefers-reduced-motion: reduce)";

/** Whether a media query holds. */
export function useMedia(query: string): boolean {
  const list = useMemo(() => matchMedia(query), [query]);
  const changes = (listener: () => void) => {
    list.addEventListener("change", listener);
    return () => list.removeEventListener("change", listener);
  };
  return useSyncExternalStore(changes, () => list.matches);
}

/** Dark or not, by choice or by system. */
export function useDark(): boolean {
  const theme = useSelect((s) => s.prefs.theme);
  const system = useMedia("(prefers-color-scheme: dark)");
  return theme === null ? system : theme === "dark";
}

const NEAR_PX = 48;
const BY_HAND_MS = 700;
const TAP_MS = 100;

/** Keeps a scrolling box at its end while its content grows, until the person scrolls up. Only what follows a
 *  wheel, a touch, a key or a pointer counts as the person's: the list corrects its place by itself too. While a
 *  pointer is pressed the box keeps still: what it was pressed on must be there when it is released. */
export function useFollow(key: unknown): {
  box: RefObject<HTMLDivElement | null>;
  content: RefObject<HTMLDivElement | null>;
  following: boolean;
  toEnd: (smooth?: boolean) => void;
  /** Stops following, as scrolling up does. */
  hold: () => void;
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
    const calm = matchMedia(CALM).matches;
    box.current?.scrollTo({ top: box.current.scrollHeight, behavior: smooth && !calm ? "smooth" : "instant" });
  };

  useEffect(() => {
    const el = box.current;
    if (!el || !content.current) return;
    const watch = new AbortController();
    const hands = { signal: watch.signal, passive: true };
    let top = el.scrollTop;
    let touched = 0;
    let held = false;
    let later: ReturnType<typeof setTimeout> | undefined;
    const touch = () => void (touched = performance.now());
    for (const kind of ["wheel", "touchmove", "keydown"] as const) el.addEventListener(kind, touch, hands);
    const press = (event: PointerEvent) => {
      clearTimeout(later);
      held = event.button === 0;
    };
    el.addEventListener("pointerdown", press, hands);
    const keepEnd = () => {
      if (follow.current && !held) el.scrollTop = el.scrollHeight;
    };
    const letGo = () => {
      if (held) touch();
      held = false;
    };
    const release = (event: PointerEvent) => {
      touch();
      clearTimeout(later);
      // After the click, which goes where the pointer is: a mouse's comes with the release, a finger's soon.
      later = setTimeout(() => (letGo(), keepEnd()), event.pointerType === "mouse" ? 0 : TAP_MS);
    };
    window.addEventListener("pointerup", release, hands);
    // A finger begins to scroll; and a scrollbar, a menu or another window may keep the release for itself.
    window.addEventListener("pointercancel", letGo, hands);
    window.addEventListener("blur", letGo, hands);
    window.addEventListener("pointermove", (event) => void (held && event.buttons === 0 && release(event)), hands);
    const scrolled = () => {
      const left = el.scrollHeight - el.clientHeight - el.scrollTop;
      const byHand = held || performance.now() - touched < BY_HAND_MS;
      if (left < NEAR_PX && el.scrollTop >= top) set(true);
      else if (byHand && el.scrollTop < top && left > 2) set(false);
      top = el.scrollTop;
    };
    const grown = new ResizeObserver(keepEnd);
    el.addEventListener("scroll", scrolled, hands);
    grown.observe(content.current);
    grown.observe(el);
    toEnd();
    return () => {
      watch.abort();
      clearTimeout(later);
      grown.disconnect();
    };
  }, [key]);

  return { box, content, following, toEnd, hold: () => set(false) };
}

/** The time in ms, again every second while `active`. */
export function useNow(active: boolean): number {
  const [now, setNow] = useState(Date.now);
  useEffect(() => {
    if (!active) return;
    setNow(Date.now());
    const timer = setInterval(() => setNow(Date.now()), 1000);
    return () => clearInterval(timer);
  }, [active]);
  return now;
}

/** What a row of the conversation remembers while it is scrolled away and not drawn. */
export const MemoryContext = createContext<Map<string, unknown>>(new Map());

export function useMemory<T>(key: string, initial: T): [T, (value: T) => void] {
  const memory = useContext(MemoryContext);
  const [value, setValue] = useState<T>(() => (memory.has(key) ? (memory.get(key) as T) : initial));
  return [
    value,
    (next) => {
      memory.set(key, next);
      setValue(next);
    },
  ];
}

/** A module that is loaded when it is first needed; null until then. */
export function lazyModule<T>(load: () => Promise<T>): () => T | null {
  let module: T | null = null;
  let loading: Promise<void> | undefined;
  return function useModule() {
    const [ready, setReady] = useState<T | null>(() => module); // a module may be a function
    useEffect(() => {
      if (ready) return;
      let here = true;
      loading ??= load().then((loaded) => void (module = loaded));
      loading.then(() => here && setReady(() => module)).catch(() => void (loading = undefined));
      return () => void (here = false);
    }, [ready]);
    return ready;
  };
}
