const MAC = /Mac|iPhone|iPad/.test(navigator.platform);

/** A shortcut as keys. */
export function Keys({ keys }: { keys: readonly string[] }) {
  return (
    <span className="strokes">
      {keys.map((key) => (
        <kbd key={key}>{key === "Ctrl" && MAC ? "⌘" : key === "Alt" && MAC ? "⌥" : key}</kbd>
      ))}
    </span>
  );
}
