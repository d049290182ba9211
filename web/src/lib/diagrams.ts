/** Mermaid, at arm's length. It sets style sheets, which the page's policy forbids, and it has had holes: so it runs in
 *  a sandboxed frame of its own (frames/diagram.html) that turns text into SVG, and the page shows the SVG as an
 *  image, in which no script runs. One frame serves all diagrams; what was drawn is kept. */

export type Drawn = { svg: string } | { fault: string };

const drawn = new Map<string, Promise<Drawn>>();
const waiting = new Map<number, (drawn: Drawn) => void>();
let frame: Promise<Window> | null = null;
let count = 0;

const KEPT = 200;
const PATIENCE_MS = 20_000;

export function draw(code: string, dark: boolean): Promise<Drawn> {
  const key = `${dark}\n${code}`;
  const known = drawn.get(key);
  if (known) return known;
  if (drawn.size >= KEPT) drawn.clear();
  const work = ask(code, dark);
  drawn.set(key, work);
  return work;
}

async function ask(code: string, dark: boolean): Promise<Drawn> {
  const target = await (frame ??= open());
  const id = ++count;
  return new Promise((resolve) => {
    const timer = setTimeout(() => settle({ fault: "timeout" }), PATIENCE_MS);
    const settle = (result: Drawn) => {
      clearTimeout(timer);
      waiting.delete(id);
      resolve(result);
    };
    waiting.set(id, settle);
    target.postMessage({ id, code, dark }, "*"); // the frame has no origin that could be named
  });
}

function open(): Promise<Window> {
  const element = document.createElement("iframe");
  element.src = "./diagram.html";
  element.setAttribute("sandbox", "allow-scripts");
  element.className = "workshop";
  element.tabIndex = -1;
  element.title = "Diagrams";
  element.ariaHidden = "true";
  return new Promise((resolve) => {
    window.addEventListener("message", ({ source, data }) => {
      if (source !== element.contentWindow || source === null) return;
      if (data?.ready === true) resolve(source as Window);
      else if (typeof data?.svg === "string") waiting.get(data.id)?.({ svg: data.svg });
      else if (typeof data?.fault === "string") waiting.get(data.id)?.({ fault: data.fault });
    });
    document.body.append(element);
  });
}

/** An address for an image of the SVG. */
export const imageOf = (svg: string): string => `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`;
