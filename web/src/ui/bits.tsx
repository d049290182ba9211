/** Small parts that several components share. */
import { Menu } from "@base-ui/react/menu";
import { type ButtonHTMLAttributes, type KeyboardEvent, type ReactElement, type ReactNode, useEffect, useState } from "react";
import { useT } from "../hooks";
import { Icon, type IconName } from "./icons";

type IconButtonProps = Omit<ButtonHTMLAttributes<HTMLButtonElement>, "aria-label"> & {
  icon: IconName;
  label: string;
  size?: number;
  testId?: string;
  hint?: string;
};

/** A button with a picture; its name is for screen readers and the tooltip. Passes on what a menu's trigger needs. */
export function IconButton({ icon, label, size = 18, testId, hint, className = "", ...rest }: IconButtonProps) {
  return (
    <button
      type="button"
      {...rest}
      className={`icon-button ${size < 18 ? "small" : ""} ${className}`}
      aria-label={label}
      title={hint ?? label}
      data-testid={testId}
    >
      <Icon name={icon} size={size} />
    </button>
  );
}

/** A menu that opens at its trigger. */
export function MenuOf({ trigger, children, label, align = "end", side = "bottom" }: {
  trigger: ReactElement;
  children: ReactNode;
  label?: string;
  align?: "start" | "center" | "end";
  side?: "top" | "bottom";
}) {
  return (
    <Menu.Root modal={false}>
      <Menu.Trigger render={trigger} />
      <Menu.Portal>
        <Menu.Positioner className="layer" align={align} side={side} sideOffset={6} collisionPadding={8}>
          <Menu.Popup className="menu" aria-label={label}>
            {children}
          </Menu.Popup>
        </Menu.Positioner>
      </Menu.Portal>
    </Menu.Root>
  );
}

export function MenuItem({ icon, children, danger = false, onClick, testId }: {
  icon: IconName;
  children: ReactNode;
  danger?: boolean;
  onClick: () => void;
  testId?: string;
}) {
  return (
    <Menu.Item className={danger ? "menu-item danger" : "menu-item"} onClick={onClick} data-testid={testId}>
      <Icon name={icon} size={16} />
      <span>{children}</span>
    </Menu.Item>
  );
}

/** One of several choices in a menu. */
export function MenuChoice({ value, children, note, testId }: { value: string; children: ReactNode; note?: ReactNode; testId?: string }) {
  return (
    <Menu.RadioItem className="menu-item choice" value={value} closeOnClick data-testid={testId}>
      <span className="tick">
        <Menu.RadioItemIndicator>
          <Icon name="check" size={16} />
        </Menu.RadioItemIndicator>
      </span>
      <span>
        {children}
        {note && <small>{note}</small>}
      </span>
    </Menu.RadioItem>
  );
}

export { Menu };

/** Copies what `text` returns. `word` shows a label beside the icon. */
export function Copy({ text, label, word = false, testId }: { text: () => string; label: string; word?: boolean; testId?: string }) {
  const t = useT();
  const [copied, setCopied] = useState(false);
  useEffect(() => {
    if (!copied) return;
    const timer = setTimeout(() => setCopied(false), 1600);
    return () => clearTimeout(timer);
  }, [copied]);
  const copy = async () => setCopied(await toClipboard(text()));
  const name = copied ? t("code.copied") : label;
  if (!word) return <IconButton icon={copied ? "check" : "copy"} label={name} size={16} {...(testId && { testId })} onClick={() => void copy()} />;
  return (
    <button type="button" className="word-button" onClick={() => void copy()} aria-label={name} data-testid={testId}>
      <Icon name={copied ? "check" : "copy"} size={14} />
      <span>{copied ? t("code.copied") : t("code.copyWord")}</span>
    </button>
  );
}

async function toClipboard(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // The clipboard API is missing on plain http beyond localhost: the old way, with a selection.
    const area = Object.assign(document.createElement("textarea"), { value: text, className: "offscreen" });
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    return copied;
  }
}

/** Hands a file to the browser's downloads. */
export function saveFile(name: string, body: Blob): void {
  const url = URL.createObjectURL(body);
  const link = Object.assign(document.createElement("a"), { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Enter without Shift, and not the Enter that accepts a word from an input method. */
export function sendsOnEnter(event: KeyboardEvent): boolean {
  return event.key === "Enter" && !event.shiftKey && !event.nativeEvent.isComposing;
}

export function fitHeight(area: HTMLTextAreaElement | null, max: number): void {
  if (!area) return;
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight, max)}px`;
}
