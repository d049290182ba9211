import { useT } from "../hooks";
import { Mark } from "./Mark";

export function Welcome({ onAsk }: { onAsk: (text: string) => void }) {
  const t = useT();
  return (
    <div className="welcome" data-testid="welcome">
      <Mark size={64} />
      <h1>rorqual</h1>
      <p>{t("app.tagline")}</p>
      <ul>
        {(["example.1", "example.2", "example.3"] as const).map((key) => (
          <li key={key}>
            <button type="button" onClick={() => onAsk(t(key))} data-testid="example">
              {t(key)}
            </button>
          </li>
        ))}
      </ul>
    </div>
  );
}
