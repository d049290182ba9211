/** What this browser keeps by itself: preferences, the key, drafts. Conversations are the server's. Storage may be
 *  missing, full or hold anything: reading never throws, and what cannot be written is not kept. */
import { type Attachment, DEFAULTS, type Draft, EMPTY, type Prefs, type State, type Store } from "./store";
import type { Settings } from "./types";

const PREFS = "rorqual.settings";
const KEY = "rorqual.key";
const DRAFTS = "rorqual.drafts";

export type Disk = Pick<Storage, "getItem" | "setItem" | "removeItem">;

/** The browser's storage, or null where it is switched off (touching it then throws). */
export function browserDisk(): Disk | null {
  try {
    return window.localStorage;
  } catch {
    return null;
  }
}

export function load(disk: Disk | null): State {
  try {
    return { ...EMPTY, prefs: prefs(disk?.getItem(PREFS)), key: disk?.getItem(KEY) ?? null, drafts: drafts(disk?.getItem(DRAFTS)) };
  } catch {
    return EMPTY;
  }
}

/** Writes what changes, soon after it changed and when the page is left. */
export function keep(store: Store, disk: Disk | null): void {
  let saved = store.get();
  let timer: ReturnType<typeof setTimeout> | undefined;
  let leaving = false;
  const write = () => {
    clearTimeout(timer);
    timer = undefined;
    const state = store.get();
    if (state.prefs !== saved.prefs) put(disk, PREFS, JSON.stringify(state.prefs));
    if (state.key !== saved.key) put(disk, KEY, state.key);
    if (state.drafts !== saved.drafts) put(disk, DRAFTS, JSON.stringify(kept(state.drafts)));
    saved = state;
  };
  store.subscribe(() => {
    const { prefs, key, drafts } = store.get();
    if (prefs === saved.prefs && key === saved.key && drafts === saved.drafts) return;
    if (leaving) write();
    else timer ??= setTimeout(write, 250);
  });
  // Other listeners may change the state after this one: from here on nothing waits.
  window.addEventListener("pagehide", () => {
    leaving = true;
    write();
  });
  window.addEventListener("pageshow", () => void (leaving = false));
}

function put(disk: Disk | null, name: string, value: string | null): void {
  try {
    if (value === null) disk?.removeItem(name);
    else disk?.setItem(name, value);
  } catch {
    // Full or forbidden: it lasts until the page is closed.
  }
}

/** Files on their way or refused cannot be kept, only those that the server has. */
function kept(drafts: State["drafts"]): Record<string, Draft> {
  const entries = Object.entries(drafts).map(([id, { text, files }]) => [id, { text, files: files.filter((f) => f.info) }] as const);
  return Object.fromEntries(entries.filter(([, draft]) => draft.text || draft.files.length));
}

type Loose = Record<string, unknown>;

function object(json: string | null | undefined): Loose {
  try {
    const value = JSON.parse(json ?? "{}");
    return typeof value === "object" && value !== null && !Array.isArray(value) ? value : {};
  } catch {
    return {};
  }
}

function prefs(json: string | null | undefined): Prefs {
  const raw = object(json);
  return {
    theme: raw.theme === "light" || raw.theme === "dark" ? raw.theme : null,
    language: raw.language === "en" || raw.language === "zh" ? raw.language : null,
    sidebar: typeof raw.sidebar === "boolean" ? raw.sidebar : DEFAULTS.sidebar,
    price: typeof raw.price === "string" ? raw.price : null,
    settings: settings(raw.settings),
  };
}

function settings(raw: unknown): Partial<Settings> {
  const from = (typeof raw === "object" && raw !== null ? raw : {}) as Loose;
  const fits: Record<keyof Settings, (v: unknown) => boolean> = {
    model: (v) => typeof v === "string",
    thinking: (v) => typeof v === "boolean",
    search: (v) => typeof v === "boolean",
    system: (v) => typeof v === "string",
    temperature: (v) => typeof v === "number" && v >= 0 && v <= 2,
    top_p: (v) => typeof v === "number" && v > 0 && v <= 1,
    max_tokens: (v) => Number.isInteger(v) && (v as number) > 0,
  };
  return Object.fromEntries(Object.entries(fits).flatMap(([name, ok]) => (ok(from[name]) ? [[name, from[name]]] : [])));
}

function drafts(json: string | null | undefined): Record<string, Draft> {
  const found: Record<string, Draft> = {};
  for (const [id, value] of Object.entries(object(json))) {
    const draft = value as Partial<Draft> | null;
    if (typeof draft?.text !== "string" || !Array.isArray(draft.files)) continue;
    const files = draft.files.filter((f): f is Attachment => typeof f?.key === "string" && typeof f.info?.id === "string");
    found[id] = { text: draft.text, files };
  }
  return found;
}
