/** Files for the next message: checked against the server's limits, handed to it, kept in the draft. */
import { ApiError } from "./api";
import { newId } from "./blank";
import { bytes, type Translate } from "./i18n";
import type { Session } from "./session";
import { type Attachment, NO_DRAFT } from "./store";

const running = new Map<string, AbortController>();

/** Adds files to a chat's draft; each is taken by the server or says why not. */
export function attach(session: Session, chat: string, files: readonly File[], t: Translate): void {
  const setup = session.store.get().setup;
  const have = filesOf(session, chat).length;
  const room = setup ? Math.max(0, setup.limits.files_per_message - have) : files.length;
  if (files.length > room && setup) session.store.set({ toast: { text: t("ask.tooMany", { n: setup.limits.files_per_message }) } });
  for (const file of files.slice(0, room)) {
    const key = newId();
    const fault = faultOf(session, file, t);
    change(session, chat, (all) => [...all, { key, name: file.name, ...(fault && { fault }) }]);
    if (!fault) void upload(session, chat, key, file, t);
  }
}

export function detach(session: Session, chat: string, key: string): void {
  const gone = filesOf(session, chat).find((f) => f.key === key);
  running.get(key)?.abort();
  change(session, chat, (all) => all.filter((f) => f.key !== key));
  if (gone?.info) void session.api.removeFile(gone.info.id).catch(() => undefined);
}

function faultOf(session: Session, file: File, t: Translate): string | null {
  const setup = session.store.get().setup;
  if (!setup) return null;
  if (file.size > setup.limits.file_bytes) return t("ask.tooLarge", { size: bytes(setup.limits.file_bytes) });
  const end = /\.[^.]+$/.exec(file.name.toLowerCase())?.[0];
  const known = !end || !setup.upload_types.length || setup.upload_types.includes(end) || file.type.startsWith("text/");
  return known ? null : t("ask.badType");
}

async function upload(session: Session, chat: string, key: string, file: File, t: Translate): Promise<void> {
  const abort = new AbortController();
  running.set(key, abort);
  let result: Partial<Attachment>;
  try {
    result = { info: await session.api.upload(file, abort.signal) };
  } catch (error) {
    result = { fault: (error instanceof ApiError && error.message) || t("ask.unreachable") };
  }
  running.delete(key);
  if (!abort.signal.aborted) change(session, chat, (all) => all.map((f) => (f.key === key ? { ...f, ...result } : f)));
}

const filesOf = (session: Session, chat: string): Attachment[] => session.store.get().drafts[chat]?.files ?? [];

function change(session: Session, chat: string, how: (files: Attachment[]) => Attachment[]): void {
  const draft = session.store.get().drafts[chat] ?? NO_DRAFT;
  session.keepDraft(chat, { ...draft, files: how(draft.files) });
}
