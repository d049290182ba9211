/** Ties a store to the browser's storage, and to the other tabs that write to it. */
import { chatFromEvent, deletedInEvent, type Disk, save } from "./storage";
import type { Store } from "./store";

const EVERY_MS = 400;

export function persist(store: Store, disk: Disk | null): void {
  let saved = store.get();
  let timer: ReturnType<typeof setTimeout> | undefined;

  const write = () => {
    clearTimeout(timer);
    timer = undefined;
    const state = store.get();
    const fits = save(disk, saved, state);
    if (fits) saved = state; // else what did not fit is tried again with the next change
    if (state.storageFull === fits) store.dispatch({ type: "set", values: { storageFull: !fits } });
  };
  const changed = () => {
    const state = store.get();
    const same = state.chats === saved.chats && state.settings === saved.settings && state.key === saved.key;
    if (!same) timer ??= setTimeout(write, EVERY_MS);
  };
  store.subscribe(changed);
  window.addEventListener("pagehide", write);
  document.addEventListener("visibilitychange", () => document.hidden && write());

  // What another tab wrote is on the disk already. Writing it again could undo that tab's next change.
  window.addEventListener("storage", ({ key, newValue }) => {
    const chat = chatFromEvent(key, newValue);
    const gone = deletedInEvent(key, newValue);
    if (chat) {
      saved = { ...saved, chats: { ...saved.chats, [chat.id]: chat } };
      store.dispatch({ type: "put", chat });
    } else if (gone && store.get().chats[gone]) {
      const { [gone]: _, ...chats } = saved.chats;
      saved = { ...saved, chats };
      store.dispatch({ type: "delete", chatId: gone });
      store.dispatch({ type: "set", values: { deleted: null } });
    }
  });
}
