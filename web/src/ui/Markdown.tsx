import type { Element } from "hast";
import { type ComponentProps, createContext, memo, type ReactNode, useContext, useMemo } from "react";
import ReactMarkdown, { type Components } from "react-markdown";
import remarkGfm from "remark-gfm";
import remarkMath from "remark-math";
import { useT } from "../hooks";
import { splitBlocks } from "../lib/blocks";
import { remarkCitations } from "../lib/citations";
import { prepare } from "../lib/prepare";
import type { Check } from "../lib/types";
import { Citation } from "./Citation";
import { CodeBlock } from "./CodeBlock";
import { Formula } from "./Formula";

// One dollar is money: lib/prepare.ts makes every formula `$$…$$`.
const PLUGINS: ComponentProps<typeof ReactMarkdown>["remarkPlugins"] = [remarkGfm, [remarkMath, { singleDollarTextMath: false }], remarkCitations];
const InLink = createContext(false);

function Link({ href, children }: { href?: string | undefined; children?: ReactNode }) {
  // No href is left when the renderer refused it (javascript: and the like).
  if (!href) return <span>{children}</span>;
  if (href.startsWith("#")) return <span className="footnote">{children}</span>;
  return (
    <a href={href} target="_blank" rel="noopener noreferrer">
      <InLink value={true}>{children}</InLink>
    </a>
  );
}

/** An image is never loaded: its address would tell a stranger who reads what. It can be opened. */
function Picture({ src, alt }: { src?: unknown; alt?: string | undefined }) {
  const t = useT();
  const text = t("image", { alt: alt || t("image.untitled") });
  const inLink = useContext(InLink);
  if (inLink || typeof src !== "string" || !src) return <span className="picture">{text}</span>;
  return (
    <a className="picture" href={src} target="_blank" rel="noopener noreferrer">
      {text}
    </a>
  );
}

/** The text and the language of a fenced block, from its tree. */
function Pre({ node, children }: { node?: Element | undefined; children?: ReactNode }) {
  const code = node?.children[0];
  if (code?.type !== "element") return <pre>{children}</pre>;
  const text = code.children.map((c) => (c.type === "text" ? c.value : "")).join("");
  const classes = code.properties.className;
  const names = Array.isArray(classes) ? classes.map(String) : [];
  if (names.includes("math-display")) return <Formula tex={text} display />;
  const language = names.find((name) => name.startsWith("language-"))?.slice(9) ?? "";
  return <CodeBlock code={text.replace(/\n$/, "")} language={language} />;
}

const COMPONENTS: Components = {
  a: ({ href, children }) => <Link href={href}>{children}</Link>,
  img: ({ src, alt }) => <Picture src={src} alt={alt} />,
  pre: ({ node, children }) => <Pre node={node}>{children}</Pre>,
  code: ({ className, children }) =>
    className?.includes("math-inline") ? <Formula tex={String(children)} /> : <code className={className}>{children}</code>,
  cite: ({ node }) => <Citation n={Number(node?.properties["data-n"] ?? node?.properties.dataN)} verdict={verdict(node)} />,
  input: ({ node: _, ...props }) => <input {...props} aria-hidden="true" tabIndex={-1} />,
  table: ({ node: _, ...props }: ComponentProps<"table"> & { node?: unknown }) => (
    <div className="table" tabIndex={0} role="group">
      <table {...props} />
    </div>
  ),
};

function verdict(node: Element | undefined): boolean | null {
  const said = node?.properties["data-found"] ?? node?.properties.dataFound;
  return said === "yes" ? true : said === "no" ? false : null;
}

export const LiveContext = createContext(false);

const Block = memo(function Block({ text, live }: { text: string; live: boolean }) {
  return (
    <LiveContext value={live}>
      <ReactMarkdown remarkPlugins={PLUGINS} components={COMPONENTS}>
        {text}
      </ReactMarkdown>
    </LiveContext>
  );
});

interface Props {
  text: string;
  live?: boolean;
  checks?: Check[] | null;
}

/** Markdown without raw HTML: tags in an answer are shown as text. */
export const Markdown = memo(function Markdown({ text, live = false, checks = null }: Props) {
  const blocks = useMemo(() => splitBlocks(prepare(text, live, checks)), [text, live, checks]);
  return (
    <div className={live ? "md live" : "md"}>
      {blocks.map((block, index) => (
        <Block key={index} text={block} live={live && index === blocks.length - 1} />
      ))}
    </div>
  );
});
