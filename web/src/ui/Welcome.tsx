import { Mark } from "./Mark";

const EXAMPLES = [
  "Tell me a short story about a whale who could not sleep.",
  "List five animals that live in the sea.",
  "Write a friendly two-line note to a neighbour.",
];

export function Welcome({ onAsk }: { onAsk: (text: string) => void }) {
  return (
    <div className="welcome" data-testid="welcome">
      <Mark size={72} />
      <h1>rorqual</h1>
      <p>Takes in a whole sea, keeps what feeds it. Ask away.</p>
      <ul>
        {EXAMPLES.map((example) => (
          <li key={example}>
            <button onClick={() => onAsk(example)} data-testid="example">
              {example}
            </button>
          </li>
        ))}
      </ul>
    </div>
  );
}
