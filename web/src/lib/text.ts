/** Small pure functions from values to words. */
import type { Answer, Chat } from "./types";

/** The first words of a message, whole, in at most `limit` characters. */
export function titleOf(message: string, limit = 48): string {
  const line = message.trim().replace(/\s+/g, " ");
  if (!line) return "New chat";
  if (line.length <= limit) return line;
  const cut = line.slice(0, limit + 1);
  const space = cut.lastIndexOf(" ");
  const words = space > limit / 3 ? cut.slice(0, space) : Array.from(line).slice(0, limit).join("");
  return `${words.replace(/[\s.,;:!?–-]+$/, "")}…`;
}

/** "3 s", "1 min 5 s". */
export function seconds(ms: number): string {
  const s = Math.max(0, Math.round(ms / 1000));
  return s < 60 ? `${s} s` : `${Math.floor(s / 60)} min ${s % 60} s`;
}

const count = (n: number, what: string) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;

/** The parts of the line under an answer. */
export function statsOf({ usage, decodeMs, finishReason }: Answer): string[] {
  const parts: string[] = [];
  if (usage) {
    const thought = usage.completion_tokens_details?.reasoning_tokens;
    parts.push(count(usage.completion_tokens, "token") + (thought ? ` (${thought.toLocaleString("en")} thinking)` : ""));
    // The first token is the prompt's work: the clock starts at it.
    if (decodeMs && usage.completion_tokens > 1) {
      const rate = ((usage.completion_tokens - 1) * 1000) / decodeMs;
      parts.push(`${rate < 10 ? rate.toFixed(1) : Math.round(rate).toLocaleString("en")} tokens/s`);
    }
    if (typeof usage.prompt_cache_hit_tokens === "number") {
      const { prompt_cache_hit_tokens: hit, prompt_tokens: all } = usage;
      parts.push(`${hit.toLocaleString("en")} of ${count(all, "prompt token")} from cache`);
    }
  }
  if (finishReason === "length") parts.push("cut at the token limit");
  else if (finishReason && finishReason !== "stop") parts.push(`ended by ${finishReason.replaceAll("_", " ")}`);
  return parts;
}

/** Chats, newest first, under the headings of the sidebar. */
export function byAge(chats: Chat[], now: number): [string, Chat[]][] {
  const day = 86_400_000;
  const midnight = new Date(now).setHours(0, 0, 0, 0);
  const groups: [string, number][] = [
    ["Today", midnight],
    ["Yesterday", midnight - day],
    ["Previous 7 days", midnight - 7 * day],
    ["Older", -Infinity],
  ];
  const found = new Map<string, Chat[]>();
  for (const chat of chats) {
    const label = groups.find(([, since]) => chat.updatedAt >= since)?.[0] ?? "Older";
    found.set(label, [...(found.get(label) ?? []), chat]);
  }
  return [...found];
}
