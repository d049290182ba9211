import { useEffect, useState } from "react";
import { useSelect, useSession, useT } from "../hooks";
import { attach } from "../lib/uploads";
import { Icon } from "./icons";

/** The whole page takes files that are dropped on it. */
export function DropZone({ place }: { place: string }) {
  const t = useT();
  const session = useSession();
  const takes = useSelect((s) => (s.setup?.upload_types.length ?? 0) > 0);
  const [over, setOver] = useState(false);
  useEffect(() => {
    if (!takes) return;
    const watch = new AbortController();
    const options = { signal: watch.signal };
    const hasFiles = (event: DragEvent) => event.dataTransfer?.types.includes("Files") ?? false;
    const drag = (event: DragEvent) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      setOver(true);
    };
    document.addEventListener("dragenter", drag, options);
    document.addEventListener("dragover", drag, options);
    document.addEventListener("dragleave", (event) => event.relatedTarget === null && setOver(false), options);
    document.addEventListener(
      "drop",
      (event) => {
        if (!hasFiles(event)) return;
        event.preventDefault();
        setOver(false);
        attach(session, place, [...(event.dataTransfer?.files ?? [])], t);
      },
      options,
    );
    return () => watch.abort();
  }, [takes, place, session, t]);
  if (!over) return null;
  return (
    <div className="drop" data-testid="drop">
      <Icon name="upload" size={32} />
      {t("ask.drop")}
    </div>
  );
}
