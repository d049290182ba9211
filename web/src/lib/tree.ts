/** A conversation is a tree: a question asked again or an answer given again is a sibling. What is shown is the
 *  one path from a root to a leaf; the leaf is the chat's `head`. */
import type { Message } from "./types";

export type Messages = ReadonlyMap<string, Message>;

export interface Shape {
  /** Ids under each id, oldest first; the roots are under "". */
  children: ReadonlyMap<string, readonly string[]>;
  path: readonly string[];
}

const under = (message: Message, messages: Messages): string =>
  message.parent !== null && messages.has(message.parent) ? message.parent : "";

/** The shape of the tree with the path to `head`, or to the newest leaf where `head` is not there. */
export function shapeOf(messages: Messages, head: string | null): Shape {
  const children = new Map<string, string[]>();
  for (const message of messages.values()) {
    const parent = under(message, messages);
    const siblings = children.get(parent);
    if (siblings) siblings.push(message.id);
    else children.set(parent, [message.id]);
  }
  return { children, path: pathTo(messages, children, head) };
}

/** From the root down to `head`, and on to the newest leaf below it. */
export function pathTo(messages: Messages, children: Shape["children"], head: string | null): string[] {
  const known = head !== null && messages.has(head);
  let id: string | undefined = leafOf(children, known ? head : "");
  const path: string[] = [];
  const seen = new Set<string>();
  while (id && !seen.has(id)) {
    seen.add(id); // a malformed import may hold a circle
    path.push(id);
    const message: Message | undefined = messages.get(id);
    id = message ? under(message, messages) : undefined;
  }
  return path.reverse();
}

/** The newest leaf below an id ("" is the root of all). */
export function leafOf(children: Shape["children"], id: string): string {
  const seen = new Set<string>();
  for (;;) {
    const next = children.get(id)?.at(-1);
    if (next === undefined || seen.has(next)) return id;
    seen.add(next);
    id = next;
  }
}

/** The ids a message can be exchanged for, itself among them. */
export function siblingsOf(messages: Messages, children: Shape["children"], id: string): readonly string[] {
  const message = messages.get(id);
  return message ? (children.get(under(message, messages)) ?? [id]) : [];
}
