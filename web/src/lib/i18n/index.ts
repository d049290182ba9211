/** Words and numbers in the language of the page. */
import { type Dictionary, en, type Key } from "./en";
import { zh } from "./zh";

export type Language = "en" | "zh";
export type { Key };

export const LANGUAGES: Readonly<Record<Language, { name: string; tag: string; words: Dictionary }>> = {
  en: { name: "English", tag: "en", words: en },
  zh: { name: "中文", tag: "zh-CN", words: zh },
};

/** The person's choice, else the browser's first language that the page has. */
export function languageOf(chosen: Language | null, asked: readonly string[]): Language {
  if (chosen) return chosen;
  for (const tag of asked) {
    if (tag.toLowerCase().startsWith("zh")) return "zh";
    if (tag.toLowerCase().startsWith("en")) return "en";
  }
  return "en";
}

export type Values = Readonly<Record<string, string | number>>;
export type Translate = (key: Key, values?: Values) => string;

export function translator(language: Language): Translate {
  const { words, tag } = LANGUAGES[language];
  return (key, values = {}) => {
    const [one, many] = words[key].split("|") as [string, string | undefined];
    const chosen = many !== undefined && values.n !== 1 ? many : one;
    return chosen.replace(/\{(\w+)\}/g, (hole, name: string) => {
      const value = values[name];
      return value === undefined ? hole : typeof value === "number" ? value.toLocaleString(tag) : value;
    });
  };
}

/** "3 s", "1 min 5 s". */
export function duration(seconds: number, language: Language): string {
  const s = Math.max(0, Math.round(seconds));
  const [m, rest] = [Math.floor(s / 60), s % 60];
  if (language === "zh") return m ? `${m} 分 ${rest} 秒` : `${s} 秒`;
  return m ? `${m} min ${rest} s` : `${s} s`;
}

/** "1.2k", "3.4M". */
export const short = (n: number): string =>
  n < 1000 ? String(n) : n < 1e6 ? `${trim(n / 1e3)}k` : `${trim(n / 1e6)}M`;

const trim = (n: number): string => (n < 10 ? n.toFixed(1).replace(/\.0$/, "") : String(Math.round(n)));

export const bytes = (n: number): string => (n < 1024 ? `${n} B` : n < 1024 ** 2 ? `${trim(n / 1024)} kB` : `${trim(n / 1024 ** 2)} MB`);
