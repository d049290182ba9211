/** Gathers calls into one per animation frame. A hidden tab gets no frames: there a timer does it. */
export interface Frames {
  request(): void;
  /** Runs what was requested now, if anything was. */
  flush(): void;
}

export function perFrame(work: () => void): Frames {
  let frame = 0;
  let timer: ReturnType<typeof setTimeout> | undefined;
  const flush = () => {
    if (timer === undefined) return;
    if (typeof cancelAnimationFrame === "function") cancelAnimationFrame(frame);
    clearTimeout(timer);
    timer = undefined;
    work();
  };
  return {
    request() {
      if (timer !== undefined) return;
      timer = setTimeout(flush, 250);
      if (typeof requestAnimationFrame === "function") frame = requestAnimationFrame(flush);
    },
    flush,
  };
}
