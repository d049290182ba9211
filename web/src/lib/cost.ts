/** What a conversation has used, and what it would cost at a published price. */
import type { Messages } from "./tree";
import type { Price, Usage } from "./types";

export interface Totals {
  prompt: number;
  cached: number;
  completion: number;
  reasoning: number;
}

/** Of every answer in the tree: branches not shown were computed too. */
export function totalsOf(messages: Messages): Totals {
  const totals: Totals = { prompt: 0, cached: 0, completion: 0, reasoning: 0 };
  for (const { usage } of messages.values()) if (usage) add(totals, usage);
  return totals;
}

function add(totals: Totals, usage: Usage): void {
  totals.prompt += usage.prompt_tokens;
  totals.cached += usage.cached_tokens;
  totals.completion += usage.completion_tokens;
  totals.reasoning += usage.reasoning_tokens;
}

/** In US dollars. Thinking is part of the completion and billed with it. */
export function costOf(totals: Totals, price: Price): number {
  const missed = Math.max(0, totals.prompt - totals.cached);
  return (missed * price.input_miss + totals.cached * price.input_hit + totals.completion * price.output) / 1e6;
}

/** "$0.00012": two figures that say something, however small. */
export function dollars(amount: number): string {
  if (amount === 0) return "$0";
  if (amount >= 0.01) return `$${amount.toFixed(2)}`;
  if (amount < 1e-6) return "< $0.000001";
  return `$${amount.toFixed(Math.min(8, 1 - Math.floor(Math.log10(amount))))}`;
}

/** About how many tokens a text is: DeepSeek's own rule of 0.3 for a character, 0.6 for a Chinese one. */
export function roughTokens(text: string): number {
  const wide = text.match(/[\u2e80-\u9fff\uf900-\ufaff]/g)?.length ?? 0;
  return Math.round(wide * 0.6 + (text.length - wide) * 0.3);
}
