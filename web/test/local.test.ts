import { expect, test } from "vitest";
import { type Disk, load } from "../src/lib/local";
import { EMPTY } from "../src/lib/store";

const disk = (values: Record<string, string>): Disk => ({ getItem: (key) => values[key] ?? null, setItem: () => undefined, removeItem: () => undefined });

test("what was kept comes back", () => {
  const draft = { text: "half a", files: [{ key: "k", name: "n", info: { id: "f" } }, { key: "lost", name: "n" }] };
  const state = load(disk({ "rorqual.settings": '{"theme":"dark","settings":{"thinking":true}}', "rorqual.key": "sk", "rorqual.drafts": JSON.stringify({ new: draft }) }));
  expect(state.prefs).toMatchObject({ theme: "dark", settings: { thinking: true } });
  expect(state.key).toBe("sk");
  expect(state.drafts.new!.files.map((f) => f.key)).toEqual(["k"]);
});

test("anything may lie in the storage, or none be there", () => {
  const odd = ["{{{", "null", "[]", "3", '{"theme":7,"sidebar":"x","settings":{"temperature":9,"model":4},"language":"fr"}', '{"new":null}', '{"new":{"text":1}}'];
  for (const value of odd) {
    const state = load(disk({ "rorqual.settings": value, "rorqual.drafts": value }));
    expect(state.prefs).toEqual(EMPTY.prefs);
    expect(state.drafts).toEqual({});
  }
  expect(load(null)).toMatchObject({ prefs: EMPTY.prefs, key: null });
  const broken: Disk = { ...disk({}), getItem: () => { throw new Error("no"); } };
  expect(load(broken)).toBe(EMPTY);
});
