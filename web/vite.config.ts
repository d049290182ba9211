import { readFileSync, writeFileSync } from "node:fs";
import { gzipSync } from "node:zlib";
import react from "@vitejs/plugin-react";
import { type Plugin } from "vite";
import { defineConfig } from "vitest/config";

/** What the built page may load: itself. Markdown that a model writes can therefore reach no other
 *  host, whatever the renderer lets through. Left out in development, where Vite injects inline code. */
const POLICY = [
  "default-src 'self'",
  "img-src 'self' data:",
  "object-src 'none'",
  "base-uri 'none'",
  "form-action 'none'",
].join("; ");

const contentSecurityPolicy: Plugin = {
  name: "content-security-policy",
  apply: "build",
  transformIndexHtml: () => [
    {
      tag: "meta",
      attrs: { "http-equiv": "Content-Security-Policy", content: POLICY },
      injectTo: "head-prepend",
    },
  ],
};

/** The documents of the sandboxed frames. A frame written with `srcdoc` would inherit the page's policy, under which no
 *  inline script runs; these are files with policies of their own (rorqual/serve/static.py sends them as headers, with
 *  `sandbox`). Nothing may be fetched in either; the diagrams' frame may load Mermaid. */
const FRAMES: Record<string, string> = {
  "preview.html":
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; " +
    "media-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'",
  "diagram.html":
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; font-src data:; " +
    "base-uri 'none'; form-action 'none'",
};

function frames(): Plugin {
  const mermaid = () => readFileSync("node_modules/mermaid/dist/mermaid.min.js", "utf8");
  const { version } = JSON.parse(readFileSync("node_modules/mermaid/package.json", "utf8")) as { version: string };
  const script = `assets/mermaid-${version}.js`;
  const page = (name: string) =>
    readFileSync(`frames/${name}`, "utf8").replace("%POLICY%", FRAMES[name] ?? "").replace("%MERMAID%", script);
  return {
    name: "frames",
    generateBundle() {
      for (const name of Object.keys(FRAMES)) this.emitFile({ type: "asset", fileName: name, source: page(name) });
      this.emitFile({ type: "asset", fileName: script, source: mermaid() });
    },
    configureServer(server) {
      for (const name of Object.keys(FRAMES)) server.middlewares.use(`/${name}`, (_, answer) => void answer.setHeader("Content-Type", "text/html").end(page(name)));
      server.middlewares.use(`/${script}`, (_, answer) => void answer.setHeader("Content-Type", "text/javascript").end(mermaid()));
    },
  };
}

/** Beside each text file its gzipped form, which the server sends to whoever takes it. */
const gzipped: Plugin = {
  name: "gzipped",
  apply: "build",
  writeBundle({ dir = "" }, bundle) {
    for (const name of Object.keys(bundle)) {
      if (!/\.(js|css|html)$/.test(name)) continue;
      const body = readFileSync(`${dir}/${name}`);
      if (body.length > 1024) writeFileSync(`${dir}/${name}.gz`, gzipSync(body, { level: 9 }));
    }
  },
};

/** Every browser that runs the page reads woff2: KaTeX's older formats would only be carried along. */
const onlyWoff2: Plugin = {
  name: "only-woff2",
  enforce: "pre",
  transform: (code, id) => (id.includes("katex") && id.endsWith(".css") ? code.replace(/,url\([^)]*\.(woff|ttf)\) format\("[^"]*"\)/g, "") : null),
};

export default defineConfig({
  base: "./",
  plugins: [react(), contentSecurityPolicy, frames(), onlyWoff2, gzipped],
  build: {
    outDir: "../rorqual/serve/page",
    emptyOutDir: true,
    target: "es2022",
    modulePreload: false,
    assetsInlineLimit: 0, // a font in a data: address would need a wider policy
    chunkSizeWarningLimit: 1200,
  },
  server: { proxy: { "/v1": "http://127.0.0.1:8000", "/chats": "http://127.0.0.1:8000" } },
  test: { include: ["test/**/*.test.{ts,tsx}"] },
});
