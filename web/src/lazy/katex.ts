/** KaTeX with its styles and fonts: a chunk of its own, loaded by the first formula. */
import katex from "katex";
import "katex/dist/katex.min.css";

export default katex;
