import { type ComponentProps, createContext, isValidElement, memo, type ReactNode, useContext, useRef } from "react";
import ReactMarkdown, { type Components } from "react-markdown";
import remarkGfm from "remark-gfm";
import { splitBlocks } from "../lib/blocks";
import { Copy } from "./Copy";

const PLUGINS = [remarkGfm];
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
  const text = `Image: ${alt || "untitled"}`;
  const inLink = useContext(InLink);
  if (inLink || typeof src !== "string" || !src) return <span className="picture">{text}</span>;
  return (
    <a className="picture" href={src} target="_blank" rel="noopener noreferrer">
      {text}
    </a>
  );
}

function CodeBlock({ children }: { children?: ReactNode }) {
  const pre = useRef<HTMLPreElement>(null);
  const code = isValidElement<{ className?: string }>(children) ? children.props.className : undefined;
  const language = /language-(\S+)/.exec(code ?? "")?.[1] ?? "text";
  return (
    <div className="code" data-testid="code-block">
      <div className="code-head">
        <span>{language}</span>
        <Copy text={() => pre.current?.textContent ?? ""} label="Copy code" word testId="copy-code" />
      </div>
      <pre ref={pre} tabIndex={0}>
        {children}
      </pre>
    </div>
  );
}

const COMPONENTS: Components = {
  a: ({ href, children }) => <Link href={href}>{children}</Link>,
  img: ({ src, alt }) => <Picture src={src} alt={alt} />,
  pre: ({ children }) => <CodeBlock>{children}</CodeBlock>,
  table: ({ node: _, ...props }: ComponentProps<"table"> & { node?: unknown }) => (
    <div className="table" tabIndex={0}>
      <table {...props} />
    </div>
  ),
};

const Block = memo(function Block({ text }: { text: string }) {
  return (
    <ReactMarkdown remarkPlugins={PLUGINS} components={COMPONENTS}>
      {text}
    </ReactMarkdown>
  );
});

/** Markdown without raw HTML: tags in an answer are shown as text. */
export const Markdown = memo(function Markdown({ text, live = false }: { text: string; live?: boolean }) {
  return (
    <div className={live ? "md live" : "md"}>
      {splitBlocks(text).map((block, index) => (
        <Block key={index} text={block} />
      ))}
    </div>
  );
});
