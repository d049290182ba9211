import { useEffect, useState } from "react";
import { Icon } from "./icons";

/** Copies what `text` returns. `word` shows a label beside the icon. */
export function Copy({ text, label, word = false, testId }: { text: () => string; label: string; word?: boolean; testId: string }) {
  const [copied, setCopied] = useState(false);
  useEffect(() => {
    if (!copied) return;
    const timer = setTimeout(() => setCopied(false), 1600);
    return () => clearTimeout(timer);
  }, [copied]);
  return (
    <button
      className={word ? "copy-word" : "icon-button small"}
      onClick={async () => setCopied(await toClipboard(text()))}
      aria-label={copied ? "Copied" : label}
      title={label}
      data-testid={testId}
    >
      <Icon name={copied ? "check" : "copy"} size={word ? 14 : 16} />
      {word && (copied ? "Copied" : "Copy")}
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
