import { readdirSync, readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { duration, languageOf, short, translator } from "../src/lib/i18n";
import { en, type Key } from "../src/lib/i18n/en";
import { zh } from "../src/lib/i18n/zh";

const holes = (text: string) => [...new Set(text.match(/\{\w+\}/g) ?? [])].sort();

test("both languages have all keys, words in each, and the same holes", () => {
  expect(Object.keys(zh).sort()).toEqual(Object.keys(en).sort());
  for (const key of Object.keys(en) as Key[]) {
    expect(zh[key].trim(), key).not.toBe("");
    expect(holes(zh[key]), key).toEqual(holes(en[key]));
  }
});

test("every key is used somewhere", () => {
  const files = ["src", "src/ui", "src/lib"].flatMap((folder) => readdirSync(folder).filter((f) => /\.tsx?$/.test(f)).map((f) => `${folder}/${f}`));
  const source = files.map((file) => readFileSync(file, "utf8")).join("\n");
  const built = /^(settings\.theme|code|answer|side|example)\./; // some of these are put together from parts
  const unused = Object.keys(en).filter((key) => !source.includes(`"${key}"`) && !built.test(key));
  expect(unused).toEqual([]);
});

test("holes are filled, plurals chosen, numbers written", () => {
  const t = translator("en");
  expect([t("side.found", { n: 1 }), t("side.found", { n: 1200 })]).toEqual(["1 chat found", "1,200 chats found"]);
  expect(translator("zh")("ask.tokens", { n: 3 })).toBe("3 个 token");
  expect([duration(3, "en"), duration(65, "en"), duration(65, "zh")]).toEqual(["3 s", "1 min 5 s", "1 分 5 秒"]);
  expect([short(999), short(1234), short(56_000), short(3_400_000)]).toEqual(["999", "1.2k", "56k", "3.4M"]);
});

test("the browser's language, unless one was chosen", () => {
  expect([languageOf(null, ["fr", "zh-TW"]), languageOf(null, ["de"]), languageOf("en", ["zh"])]).toEqual(["zh", "en", "en"]);
});
