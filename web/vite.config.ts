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

export default defineConfig({
  base: "./",
  plugins: [react(), contentSecurityPolicy],
  build: { outDir: "../rorqual/serve/page", emptyOutDir: true, target: "es2022", modulePreload: false },
  server: { proxy: { "/v1": "http://127.0.0.1:8000" } },
  test: { include: ["test/**/*.test.{ts,tsx}"] },
});
