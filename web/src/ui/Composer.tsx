import { type ClipboardEvent, type KeyboardEvent, type RefObject, type SubmitEvent, memo, useEffect, useLayoutEffect, useRef, useState } from "react";
import { useSelect, useSession, useSettings, useT } from "../hooks";
import { NEW } from "../lib/session";
import { NO_DRAFT } from "../lib/store";
import { isRunning } from "../lib/types";
import { attach, detach } from "../lib/uploads";
import { Attachments } from "./Attachments";
import { fitHeight, IconButton, sendsOnEnter } from "./bits";
import { CostLine } from "./CostLine";
import { Icon, type IconName } from "./icons";
import { Notice } from "./Notice";

interface Props {
  chat: string | null;
  onAsk: (text: string) => void;
}

const KEEP_MS = 250;

export const Composer = memo(function Composer({ chat, onAsk }: Props) {
  const t = useT();
  const session = useSession();
  const place = chat ?? NEW;
  const draft = useSelect((s) => s.drafts[place] ?? NO_DRAFT);
  const running = useRunning(chat);
  const [text, setText] = useState(draft.text);
  const area = useRef<HTMLTextAreaElement>(null);
  useLayoutEffect(() => fitHeight(area.current, 240), [text]);
  useFocus(area, place);
  const kept = useKept(place, text, setText);

  const ready = draft.files.every((f) => f.info) && (text.trim() !== "" || draft.files.length > 0);
  const submit = (event?: SubmitEvent) => {
    event?.preventDefault();
    if (running || !ready) return;
    kept.current.text = "";
    setText("");
    onAsk(text.trim());
  };
  const keyDown = (event: KeyboardEvent) => {
    if (sendsOnEnter(event)) {
      event.preventDefault();
      submit();
    } else if (event.key === "ArrowUp" && !text && chat !== null) editLast(session, chat);
  };
  const paste = (event: ClipboardEvent) => {
    const files = [...event.clipboardData.files];
    if (!files.length) return;
    event.preventDefault();
    attach(session, place, files, t);
  };

  return (
    <div className="dock">
      <Notice />
      <form className="composer" onSubmit={submit}>
        <Attachments files={draft.files} onRemove={(key) => detach(session, place, key)} />
        <textarea
          ref={area}
          value={text}
          rows={1}
          placeholder={t("ask.placeholder")}
          aria-label={t("ask.label")}
          enterKeyHint="send"
          data-testid="input"
          onChange={(event) => setText(event.target.value)}
          onKeyDown={keyDown}
          onPaste={paste}
        />
        <div className="bar">
          <AttachButton place={place} />
          <Switches chat={chat} />
          <span className="grow" />
          {running !== null && chat !== null ? (
            <button type="button" className="send stop" onClick={() => void session.stop(chat, running)} aria-label={t("ask.stop")} title={`${t("ask.stop")} (Esc)`} data-testid="stop">
              <span />
            </button>
          ) : (
            <button className="send" disabled={!ready} aria-label={t("ask.send")} title={t("ask.send")} data-testid="send">
              <Icon name="up" />
            </button>
          )}
        </div>
      </form>
      <CostLine chat={chat} />
    </div>
  );
});

/** The id of the answer that is being written at the end of what is shown. */
export function useRunning(chat: string | null): string | null {
  return useSelect((s) => {
    const thread = chat === null ? undefined : s.threads[chat];
    const last = thread?.messages.get(thread.path.at(-1) ?? "");
    return last && isRunning(last) ? last.id : null;
  });
}

function useFocus(area: RefObject<HTMLTextAreaElement | null>, place: string): void {
  useEffect(() => {
    if (matchMedia("(hover: hover)").matches) area.current?.focus(); // no keyboard popping up on phones
  }, [area, place]);
}

/** The text survives: typing only changes this component, and is kept in the draft a moment later. */
function useKept(place: string, text: string, setText: (text: string) => void): RefObject<{ place: string; text: string }> {
  const session = useSession();
  const now = useRef({ place, text });
  const stored = useSelect((s) => s.drafts[place]?.text ?? "");
  const keepNow = () => {
    const draft = session.store.get().drafts[now.current.place] ?? NO_DRAFT;
    if (now.current.text) session.keepDraft(now.current.place, { ...draft, text: now.current.text });
  };
  useEffect(() => {
    if (now.current.place !== place || (now.current.text === "" && stored)) {
      keepNow(); // what was typed last, where it was typed
      now.current = { place, text: stored };
      setText(stored); // another chat, or its draft has just come from the server
    }
  }, [place, stored]);
  useEffect(() => {
    if (now.current.text === text) return;
    const keep = () => {
      const draft = session.store.get().drafts[place] ?? NO_DRAFT;
      session.keepDraft(place, { ...draft, text });
    };
    now.current = { place, text };
    const timer = setTimeout(keep, KEEP_MS);
    window.addEventListener("pagehide", keep);
    return () => {
      clearTimeout(timer);
      window.removeEventListener("pagehide", keep);
    };
  }, [text]);
  return now;
}

/** The last question that is shown, in its editor. */
export function editLast(session: ReturnType<typeof useSession>, chat: string): void {
  const thread = session.store.get().threads[chat];
  const last = thread?.path.findLast((id) => thread.messages.get(id)?.role === "user");
  if (last) session.editing(last);
}

function AttachButton({ place }: { place: string }) {
  const t = useT();
  const session = useSession();
  const types = useSelect((s) => s.setup?.upload_types);
  const input = useRef<HTMLInputElement>(null);
  if (!types?.length) return null;
  return (
    <>
      <IconButton icon="clip" label={t("ask.attach")} onClick={() => input.current?.click()} testId="attach" />
      <input
        ref={input}
        type="file"
        multiple
        hidden
        accept={types.join(",")}
        onChange={(event) => {
          attach(session, place, [...(event.target.files ?? [])], t);
          event.target.value = "";
        }}
        data-testid="file-input"
      />
    </>
  );
}

/** DeepThink and Search, for this conversation. */
function Switches({ chat }: { chat: string | null }) {
  const t = useT();
  const session = useSession();
  const settings = useSettings(chat);
  const setup = useSelect((s) => s.setup);
  if (!setup) return null;
  const model = setup.models.find((m) => m.id === settings.model);
  return (
    <>
      {model?.thinking_mode === "always" ? (
        <Switch icon="think" word={t("ask.think")} hint={t("ask.think.always")} pressed disabled testId="deepthink" />
      ) : (
        model?.thinking && (
          <Switch
            icon="think"
            word={t("ask.think")}
            hint={t("ask.think.hint")}
            pressed={settings.thinking}
            onClick={() => session.settings(chat, { thinking: !settings.thinking })}
            testId="deepthink"
          />
        )
      )}
      {setup.search.available && (
        <Switch
          icon="globe"
          word={t("ask.search")}
          hint={setup.search.provider ? `${t("ask.search.hint")} (${setup.search.provider})` : t("ask.search.hint")}
          pressed={settings.search}
          onClick={() => session.settings(chat, { search: !settings.search })}
          testId="search-toggle"
        />
      )}
    </>
  );
}

interface SwitchProps {
  icon: IconName;
  word: string;
  hint: string;
  pressed: boolean;
  disabled?: boolean;
  onClick?: () => void;
  testId: string;
}

function Switch({ icon, word, hint, pressed, disabled = false, onClick, testId }: SwitchProps) {
  return (
    <button type="button" className="toggle" aria-pressed={pressed} title={hint} disabled={disabled} onClick={onClick} data-testid={testId}>
      <Icon name={icon} size={16} />
      <span>{word}</span>
    </button>
  );
}
