/** One event: its `data`, and the last `id` seen until then ("" before the first). */
export interface SseEvent {
  id: string;
  data: string;
}

/** Server-sent events, from bytes to the id and the text of each event.
 *
 *  Written out rather than left to `EventSource`, which can send neither a POST nor a header. The
 *  network cuts the stream anywhere: inside a UTF-8 sequence, between CR and LF, in the middle of
 *  `data:`. Whatever the cut, the events are the same; test/sse.test.ts tries every one.
 *
 *  `event` and `retry` are ignored: the server does not use them. */
export class SseDecoder {
  private readonly utf8 = new TextDecoder(); // drops a BOM, as the standard asks
  private rest = "";
  private data: string[] = [];
  private id = "";

  /** Takes the next bytes, returns the events they complete. */
  push(bytes: Uint8Array): SseEvent[] {
    return this.lines(this.utf8.decode(bytes, { stream: true }), false);
  }

  /** The stream has ended: an event whose closing blank line never came still counts. */
  end(): SseEvent[] {
    const events = this.lines(this.utf8.decode(), true);
    return this.data.length ? [...events, this.take()] : events;
  }

  private lines(text: string, last: boolean): SseEvent[] {
    const events: SseEvent[] = [];
    this.rest += text;
    const eol = /[\r\n]/g;
    let from = 0;
    for (;;) {
      eol.lastIndex = from;
      const end = eol.exec(this.rest)?.index;
      if (end === undefined) break;
      const pair = this.rest[end] === "\r" && this.rest[end + 1] === "\n";
      // A CR at the very end may be the first half of CR LF: wait for the next byte.
      if (this.rest[end] === "\r" && end + 1 === this.rest.length && !last) break;
      this.line(this.rest.slice(from, end), events);
      from = end + (pair ? 2 : 1);
    }
    this.rest = this.rest.slice(from);
    if (last && this.rest) {
      this.line(this.rest, events);
      this.rest = "";
    }
    return events;
  }

  private line(line: string, events: SseEvent[]): void {
    if (line === "") {
      if (this.data.length) events.push(this.take());
    } else if (line === "data" || line.startsWith("data:")) {
      const value = line.slice(5);
      this.data.push(value.startsWith(" ") ? value.slice(1) : value);
    } else if (line.startsWith("id:")) {
      this.id = line.slice(3).trimStart();
    } // else a comment (": keep-alive") or a field that is not used here
  }

  private take(): SseEvent {
    const event = { id: this.id, data: this.data.join("\n") };
    this.data = [];
    return event;
  }
}
