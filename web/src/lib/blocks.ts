/** Cuts Markdown into blocks that can be rendered one by one.
 *
 *  While an answer streams only its last block changes, so only that one is parsed again: without this
 *  every frame would parse the whole answer. The cut is careful rather than fine: only before a line that
 *  follows a blank one, stands at the margin, is no list item and is in no code fence. What needs the
 *  whole text (link definitions, footnotes) is not cut at all. */
export function splitBlocks(text: string): string[] {
  if (/^ {0,3}\[[^\]\n]+\]:/m.test(text)) return [text];
  const blocks: string[] = [];
  let block = "";
  let fence = "";
  let blank = false;
  for (const line of text.split(/(?<=\n)/)) {
    const mark = /^ {0,3}(`{3,}|~{3,})/.exec(line)?.[1];
    if (blank && !fence && /^[^\s]/.test(line) && !/^([-+*]|\d{1,9}[.)])(\s|$)/.test(line)) {
      blocks.push(block);
      block = "";
    }
    block += line;
    if (mark && !fence) fence = mark;
    else if (mark && fence && mark.startsWith(fence) && line.trim() === mark) fence = "";
    blank = line.trim() === "";
  }
  return block ? [...blocks, block] : blocks;
}
