/** What a person does, as methods: ask, stop, edit, choose a branch, rename, search. Every change is drawn at once
 *  and told to the server; the state is in the store. */
import { Api, ApiError, type Question } from "./api";
import { blank, blankAgain, lasting, newId, titleOf } from "./blank";
import { type Follower, Runs } from "./runs";
import {
  type Draft,
  inOrder,
  messageOf,
  NO_DRAFT,
  type Panel,
  type Prefs,
  settingsOf,
  type Store,
  type Thread,
  withInfo,
  withMessages,
  withThread,
} from "./store";
import { leafOf } from "./tree";
import { type FileInfo, isRunning, type Message, type Settings, type Summary } from "./types";

export const NEW = "new";
const SOON_MS = 400;

export class Session {
  readonly api: Api;
  private readonly runs: Runs;
  private listing = 0;

  constructor(
    readonly store: Store,
    api?: Api,
    follower?: Follower,
  ) {
    this.api = api ?? new Api(() => store.get().key);
    this.runs = new Runs(this.api, store, () => void this.refreshList(), follower);
  }

  // ---- the server

  async start(): Promise<void> {
    await this.guard(async () => {
      const setup = await this.api.setup();
      this.store.set({ setup, fault: null, askKey: false });
      await this.refreshList();
    });
  }

  /** Another key, or none: other conversations. What waits in the open one for want of a key is sent again. */
  async useKey(key: string | null, chat: string | null): Promise<void> {
    const waiting = key !== null && chat !== null && this.unsent(chat);
    const threads = waiting ? { [chat]: this.store.get().threads[chat] as Thread } : {};
    this.store.set({ key, askKey: false, fault: null, setup: null, threads, list: { chats: [], next: null, query: "", loaded: false } });
    await this.start();
    if (chat === null || !this.store.get().setup) return;
    const thread = threads[chat];
    const last = thread?.messages.get(thread.path.at(-1) ?? "");
    if (last?.unsent) this.again(chat, last);
    else await this.open(chat);
  }

  /** Runs something; what fails is shown, above the composer or (`quiet`) as a toast. Returns whether it went well. */
  private async guard(work: () => Promise<void>, quiet = false): Promise<boolean> {
    try {
      await work();
      return true;
    } catch (error) {
      const fault = error instanceof ApiError ? error.fault : { message: String(error) };
      if (fault.status === 401) this.store.set({ askKey: true });
      if (quiet && fault.status !== 401) this.store.set({ toast: { text: fault.message } });
      else this.store.set({ fault });
      return false;
    }
  }

  // ---- the list

  /** Reads the first page of the list again, as far as the search words are still the same. */
  async refreshList(): Promise<void> {
    const asked = ++this.listing;
    const { query } = this.store.get().list;
    await this.guard(async () => {
      const { chats, next } = await this.api.list(query, null);
      if (asked === this.listing) this.store.set({ list: { chats, next, query, loaded: true }, fault: null });
    });
  }

  async searchChats(query: string): Promise<void> {
    this.store.update((s) => ({ ...s, list: { ...s.list, query } }));
    await this.refreshList();
  }

  async moreChats(): Promise<void> {
    const { next, query } = this.store.get().list;
    if (next === null) return;
    const asked = ++this.listing;
    await this.guard(async () => {
      const page = await this.api.list(query, next);
      if (asked !== this.listing) return;
      this.store.update((s) => {
        const known = new Set(s.list.chats.map((c) => c.id));
        return { ...s, list: { ...s.list, chats: [...s.list.chats, ...page.chats.filter((c) => !known.has(c.id))], next: page.next } };
      });
    }, true);
  }

  /** Gets a chat and follows what is being written in it. Returns false where there is no such chat. */
  async open(chat: string): Promise<boolean> {
    try {
      const full = await this.api.chat(chat);
      this.store.update((s) => {
        const next = { ...withThread(s, full), fault: null };
        return full.draft && !s.drafts[chat] ? { ...next, drafts: { ...next.drafts, [chat]: { text: full.draft, files: [] } } } : next;
      });
      for (const message of full.messages) if (isRunning(message)) this.runs.follow(chat, message.id);
      return true;
    } catch (error) {
      if (error instanceof ApiError && error.status === 404) return false;
      await this.guard(() => Promise.reject(error));
      return true;
    }
  }

  // ---- a conversation

  /** Asks in a chat, or in a new one. Returns the chat's id at once. */
  ask(chatId: string | null, text: string, files: FileInfo[]): string {
    const chat = chatId ?? newId();
    const settings = settingsOf(this.store.get(), chatId);
    const now = Date.now() / 1000;
    if (chatId === null) {
      const info = { id: chat, title: titleOf(text), pinned: false, created: now, updated: now, settings, head: null, draft: "" };
      const row: Summary = { id: chat, title: info.title, pinned: false, created: now, updated: now, model: settings.model };
      this.store.update((s) => ({
        ...withThread(s, { ...info, messages: [] }),
        list: { ...s.list, chats: s.list.query ? s.list.chats : inOrder([row, ...s.list.chats]) },
      }));
    }
    const parent = this.store.get().threads[chat]?.path.at(-1) ?? null;
    this.send(chat, parent, text, files, chatId === null);
    this.keepDraft(chatId ?? NEW, NO_DRAFT);
    return chat;
  }

  /** Asks a question in other words: a sibling of the old one. */
  edit(chat: string, question: Message, text: string): void {
    this.send(chat, question.parent, text, question.files, false);
  }

  private send(chat: string, parent: string | null, text: string, files: FileInfo[], fresh: boolean): void {
    const settings = settingsOf(this.store.get(), chat);
    const question = blank(chat, parent, "user", settings, { content: text, files });
    const answer = blank(chat, question.id, "assistant", settings, {});
    this.store.update((s) => withMessages(s, chat, [question, answer], answer.id));
    void this.deliver(chat, question, answer, settings, fresh);
  }

  private async deliver(chat: string, question: Message, answer: Message, settings: Settings, fresh: boolean): Promise<void> {
    const body: Question = {
      id: question.id,
      parent: question.parent,
      content: question.content,
      files: question.files.map((f) => f.id),
      answer: { id: answer.id, settings },
    };
    await this.attempt(chat, [question, answer], async () => {
      if (fresh) await this.create(chat, settings);
      const taken = await this.api.ask(chat, body);
      this.store.update((s) => withInfo(withMessages(s, chat, [taken.question, taken.answer]), chat, { updated: Date.now() / 1000 }));
      this.runs.follow(chat, answer.id);
      void this.refreshList();
    });
  }

  /** A chat that is there already (from a first try whose reply was lost) is as good. */
  private async create(id: string, settings: Settings): Promise<void> {
    try {
      await this.api.create({ id, settings });
    } catch (error) {
      if (!(error instanceof ApiError && error.status === 409)) throw error;
    }
  }

  /** Sends what makes an answer; if the server does not take it, the answer says so and can be tried again. */
  private async attempt(chat: string, messages: Message[], work: () => Promise<void>): Promise<void> {
    try {
      await work();
    } catch (error) {
      const fault = error instanceof ApiError ? error.fault : { message: String(error) };
      if (fault.status === 401) this.store.set({ askKey: true });
      const failed = messages.map((m): Message => {
        const end = m.role === "assistant" ? { status: "error" as const, error: { message: fault.message, code: String(fault.status ?? "away") } } : {};
        return { ...m, ...end, unsent: true };
      });
      this.store.update((s) => withMessages(s, chat, failed));
    }
  }

  /** One more answer to the question before this one; the first try again if the server never took it. */
  again(chat: string, old: Message): void {
    const parent = old.parent ? messageOf(this.store.get(), chat, old.parent) : undefined;
    if (!parent) return;
    const settings = settingsOf(this.store.get(), chat);
    if (parent.unsent) {
      const [question, answer] = [blankAgain(parent), { ...blank(chat, parent.id, "assistant", settings, {}), id: old.id }];
      const fresh = question.parent === null;
      this.store.update((s) => withMessages(s, chat, [question, answer], answer.id));
      void this.deliver(chat, question, answer, settings, fresh);
      return;
    }
    const answer = { ...blank(chat, parent.id, "assistant", settings, {}), id: old.unsent ? old.id : newId() };
    this.store.update((s) => withMessages(s, chat, [answer], answer.id));
    void this.attempt(chat, [answer], async () => {
      const taken = await this.api.answer(chat, { id: answer.id, parent: parent.id, settings });
      this.store.update((s) => withMessages(s, chat, [taken]));
      this.runs.follow(chat, answer.id);
    });
  }

  /** Goes on from where an answer was cut; with an edited thought, from there and as a sibling. */
  async goOn(chat: string, message: Message, thinking?: string): Promise<void> {
    await this.guard(async () => {
      const id = newId();
      const taken = await this.api.goOn(chat, message.id, thinking === undefined ? {} : { id, thinking });
      this.store.update((s) => withMessages(s, chat, [taken], taken.id));
      this.runs.follow(chat, taken.id);
    }, true);
  }

  async stop(chat: string, message: string, thinking = false): Promise<void> {
    if (!this.store.get().threads[chat]?.messages.get(message)) return;
    await this.guard(async () => {
      const taken = await this.api.stop(chat, message, thinking);
      if (!thinking && !isRunning(taken)) this.runs.end(chat, taken);
    }, true);
  }

  /** Shows another sibling, and the newest that follows it. */
  choose(chat: string, id: string): void {
    const thread = this.store.get().threads[chat];
    if (!thread) return;
    const head = leafOf(thread.children, id);
    this.store.update((s) => withInfo(s, chat, { head }));
    void this.guard(async () => void (await this.api.change(chat, { head })), true);
  }

  settings(chat: string | null, values: Partial<Settings>): void {
    const settings = { ...settingsOf(this.store.get(), chat), ...values };
    this.store.update((s) => ({ ...s, prefs: { ...s.prefs, settings: { ...s.prefs.settings, ...lasting(values) } } }));
    if (chat === null) return this.prefs({ settings: { ...settings } });
    this.store.update((s) => withInfo(s, chat, { settings }));
    const waiting = this.untold.get(chat);
    clearTimeout(waiting?.timer);
    this.untold.set(chat, { values: { ...waiting?.values, ...values }, timer: setTimeout(() => this.tellSettings(chat), SOON_MS) });
  }

  private readonly untold = new Map<string, { values: Partial<Settings>; timer: ReturnType<typeof setTimeout> }>();

  /** Typing in a field makes one request, not one for each letter. A question carries its settings anyway. */
  private tellSettings(chat: string): void {
    const waiting = this.untold.get(chat);
    if (!waiting) return;
    clearTimeout(waiting.timer);
    this.untold.delete(chat);
    void this.guard(async () => void (await this.api.change(chat, { settings: waiting.values }, true)), true);
  }

  // ---- the chat as a whole

  async rename(chat: string, title: string): Promise<void> {
    await this.tell(chat, { title });
  }

  async pin(chat: string, pinned: boolean): Promise<void> {
    await this.tell(chat, { pinned });
    this.store.update((s) => ({ ...s, list: { ...s.list, chats: inOrder(s.list.chats) } }));
  }

  private async tell(chat: string, values: { title?: string; pinned?: boolean }): Promise<void> {
    this.store.update((s) => withInfo(s, chat, values));
    if (!(await this.guard(async () => void (await this.api.change(chat, values)), true))) await this.refreshList();
  }

  /** Deletes at once, so that what is deleted stays deleted; undoing brings back what was exported before. */
  async delete(chat: string, words: { deleted: string; undo: string }): Promise<void> {
    await this.guard(async () => {
      const kept = await this.api.exported(chat, "json");
      this.runs.forget(chat);
      await this.api.remove(chat);
      const gone = this.store.get().list.chats.find((c) => c.id === chat);
      this.store.update((s) => {
        const { [chat]: _, ...threads } = s.threads;
        const { [chat]: __, ...drafts } = s.drafts;
        return { ...s, threads, drafts, list: { ...s.list, chats: s.list.chats.filter((c) => c.id !== chat) } };
      });
      const run = async () => void (await this.import(JSON.parse(await kept.body.text()), gone?.pinned));
      this.store.set({ toast: { text: words.deleted, action: { label: words.undo, run: () => void run() } } });
    }, true);
  }

  /** Takes an exported conversation. Returns its id, or null where the server does not take it. */
  async import(exported: unknown, pinned?: boolean): Promise<string | null> {
    let id: string | null = null;
    await this.guard(async () => {
      const chat = await this.api.restore(exported);
      id = chat.id;
      if (pinned && !chat.pinned) await this.api.change(chat.id, { pinned });
      await this.refreshList();
    }, true);
    return id;
  }

  async download(chat: string, format: "markdown" | "json"): Promise<{ name: string; body: Blob } | null> {
    let file: { name: string; body: Blob } | null = null;
    await this.guard(async () => void (file = await this.api.exported(chat, format)), true);
    return file;
  }

  /** Whether the page holds something of a chat that the server does not. */
  unsent(chat: string): boolean {
    for (const message of this.store.get().threads[chat]?.messages.values() ?? []) if (message.unsent) return true;
    return false;
  }

  /** Before the page goes: what waits is told, and questions that the server never took become drafts again. */
  rescue(): void {
    for (const chat of [...this.untold.keys()]) this.tellSettings(chat);
    for (const thread of Object.values(this.store.get().threads)) {
      for (const message of thread.messages.values()) {
        if (!message.unsent || message.role !== "user") continue;
        const files = message.files.map((info) => ({ key: info.id, name: info.name, info }));
        this.store.update((s) => ({ ...s, drafts: { ...s.drafts, [message.parent === null ? NEW : thread.info.id]: { text: message.content, files } } }));
      }
    }
  }

  // ---- what is not the server's

  private drafting: Record<string, ReturnType<typeof setTimeout>> = {};

  /** Keeps what is being written: in this browser at once, on the server soon. */
  keepDraft(chat: string, draft: Draft): void {
    const old = this.store.get().drafts[chat] ?? NO_DRAFT;
    if (old.text === draft.text && old.files === draft.files) return;
    this.store.update((s) => ({ ...s, drafts: { ...s.drafts, [chat]: draft } }));
    if (chat === NEW || old.text === draft.text) return;
    clearTimeout(this.drafting[chat]);
    this.drafting[chat] = setTimeout(() => {
      delete this.drafting[chat];
      if (this.store.get().threads[chat]) void this.api.change(chat, { draft: draft.text }, true).catch(() => undefined);
    }, 800);
  }

  prefs = (values: Partial<Prefs>): void => this.store.update((s) => ({ ...s, prefs: { ...s.prefs, ...values } }));
  show = (panel: Panel): void => this.store.set({ panel });
  editing = (editing: string | null): void => this.store.set({ editing });
}
