/** A remark plugin: `[citation:n]` in text becomes an element `cite`, one for each number. */
import type { Nodes, PhrasingContent, Root } from "mdast";
import { CITED } from "./prepare";

export function remarkCitations() {
  return (tree: Root): void => walk(tree);
}

function walk(node: Nodes): void {
  if (!("children" in node)) return;
  const children: PhrasingContent[] = [];
  let changed = false;
  for (const child of node.children as PhrasingContent[]) {
    if (child.type === "text" && child.value.includes("[citation:")) {
      children.push(...split(child.value));
      changed = true;
    } else {
      walk(child);
      children.push(child);
    }
  }
  if (changed) (node as { children: PhrasingContent[] }).children = children;
}

function split(text: string): PhrasingContent[] {
  const parts: PhrasingContent[] = [];
  let from = 0;
  for (const match of text.matchAll(CITED)) {
    // A chip stands close to its word.
    const before = text.slice(from, match.index);
    if (before) parts.push({ type: "text", value: before });
    for (const n of match[1]?.split(/[,，]/) ?? []) parts.push(cite(Number(n), match[2]));
    from = match.index + match[0].length;
  }
  const rest = text.slice(from);
  return rest ? [...parts, { type: "text", value: rest }] : parts;
}

function cite(n: number, found: string | undefined): PhrasingContent {
  const hProperties = { "data-n": String(n), ...(found && { "data-found": found }) };
  return { type: "text", value: "", data: { hName: "cite", hProperties, hChildren: [] } } as PhrasingContent;
}
