import { Dialog } from "@base-ui/react/dialog";
import { type ReactNode, Fragment, useState } from "react";
import { useSelect, useSession, useT } from "../hooks";
import type { Key } from "../lib/i18n";
import { IconButton } from "./bits";
import { Keys } from "./Keys";
import { Palette } from "./Palette";

/** A dialog over the page; the focus stays in it and goes back where it was. */
export function Modal({ open, onClose, title, className, children, testId }: {
  open: boolean;
  onClose: () => void;
  title: string;
  className: string;
  children: ReactNode;
  testId: string;
}) {
  const openings = useOpenings(open);
  return (
    <Dialog.Root open={open} onOpenChange={(now) => !now && onClose()}>
      <Dialog.Portal>
        <Dialog.Backdrop className="backdrop" />
        <Dialog.Popup className={`dialog ${className}`} data-testid={testId}>
          <Dialog.Title className={className === "palette" ? "offscreen" : undefined}>{title}</Dialog.Title>
          <Fragment key={openings}>{children}</Fragment>
        </Dialog.Popup>
      </Dialog.Portal>
    </Dialog.Root>
  );
}

/** How often it was opened: as a key it gives every opening fresh content, though the last may still be fading out. */
function useOpenings(open: boolean): number {
  const [{ count, was }, set] = useState({ count: 0, was: false });
  if (open !== was) set({ count: count + Number(open), was: open });
  return count;
}

/** The palette and the list of shortcuts. */
export function Dialogs({ chat }: { chat: string | null }) {
  const t = useT();
  const session = useSession();
  const open = useSelect((s) => s.dialog);
  const close = () => session.store.set({ dialog: null });
  return (
    <>
      <Modal open={open === "palette"} onClose={close} title={t("palette.title")} className="palette" testId="palette">
        <Palette chat={chat} onClose={close} />
      </Modal>
      <Modal open={open === "keys"} onClose={close} title={t("keys.title")} className="keys" testId="keys">
        <Dialog.Close render={<IconButton icon="close" className="corner" label={t("panel.close")} />} />
        <dl>
          {SHORTCUTS.map(([key, ...strokes]) => (
            <div key={key}>
              <dt>{t(key)}</dt>
              <dd>
                <Keys keys={strokes} />
              </dd>
            </div>
          ))}
        </dl>
      </Modal>
    </>
  );
}

const SHORTCUTS: readonly [Key, ...string[]][] = [
  ["keys.palette", "Ctrl", "K"],
  ["keys.new", "Ctrl", "Shift", "O"],
  ["keys.side", "Ctrl", "Shift", "S"],
  ["keys.focus", "Shift", "Esc"],
  ["keys.think", "Alt", "T"],
  ["keys.search", "Alt", "S"],
  ["keys.send", "Enter"],
  ["keys.line", "Shift", "Enter"],
  ["keys.last", "↑"],
  ["keys.stop", "Esc"],
  ["keys.help", "Ctrl", "/"],
];
