import { useT } from "../hooks";
import { short } from "../lib/i18n";
import type { Attachment } from "../lib/store";
import type { FileInfo } from "../lib/types";
import { Icon } from "./icons";

interface ChipProps {
  name: string;
  info?: FileInfo | undefined;
  fault?: string | undefined;
  onRemove?: () => void;
}

/** A file as a chip: its name, its size in tokens, what is wrong with it. */
export function FileChip({ name, info, fault, onRemove }: ChipProps) {
  const t = useT();
  const note = fault ?? (info ? [t("ask.tokens", { n: info.tokens }).replace(/[\d,.]+/, short(info.tokens)), info.truncated && t("ask.truncated")].filter(Boolean).join(" · ") : "…");
  return (
    <li className={fault ? "file-chip bad" : info ? "file-chip" : "file-chip busy"} role={fault ? "alert" : undefined} data-testid="file-chip">
      <Icon name={fault ? "warn" : info?.kind === "code" ? "code" : "file"} size={18} />
      <span>
        <strong title={name}>{name}</strong>
        <small>{info || fault ? note : <span aria-label={t("ask.uploading", { name })}>…</span>}</small>
      </span>
      {onRemove && (
        <button type="button" onClick={onRemove} aria-label={t("ask.remove", { name })} title={t("ask.remove", { name })} data-testid="remove-file">
          <Icon name="close" size={14} />
        </button>
      )}
    </li>
  );
}

export function Attachments({ files, onRemove }: { files: Attachment[]; onRemove: (key: string) => void }) {
  const t = useT();
  if (!files.length) return null;
  return (
    <ul className="chips" aria-label={t("ask.attach")} data-testid="attachments">
      {files.map((file) => (
        <FileChip key={file.key} name={file.name} info={file.info} fault={file.fault} onRemove={() => onRemove(file.key)} />
      ))}
    </ul>
  );
}
