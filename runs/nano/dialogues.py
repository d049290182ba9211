"""Dialogues and simple prose written by SmolLM2-135M-Instruct, as training data for rorqual nano.

What: reads jobs from a prompt file (see `prompts.py`), lets the teacher answer them in one continuously refilled
batch, filters what comes out, and writes `OUT/part-K.jsonl.xz` plus `OUT/stats.json`.

Why this way: the teacher has 135 M parameters, so one GPU decodes thousands of rows at once and everything around the
matrix products decides the speed. Hence a forward of our own instead of a library's `generate`: preallocated key and
value caches, one CUDA graph for the whole step (sampling included), every row at its own position so that a finished
row is replaced at once, and one attention kernel that reads only the part of a row's cache that is filled. Text work
(decoding, filtering, tokenising new prompts) happens while the GPU runs the next steps. Every fast path has a slow
one behind it: no Triton or a wrong result of its kernel -> scaled_dot_product_attention; no graph -> eager steps.

Left out: speculative decoding, paged caches, several GPUs. The GGUF reader knows the three tensor types of this one
file (F32, Q4_1, Q8_0) and needs numpy only.

    python runs/nano/dialogues.py --gguf smollm2.gguf --prompts data/nano/prompts.jsonl.xz --out OUT --seconds 250
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from dialogues_filter import SENTENCE_END, WORD, alike, clean, leaks, off_topic
from teacher import GGUFReader, Teacher, read_tokenizer, say
from teacher_engine import Done, Engine, Request

# ----------------------------------------------------------------------------------------------------- the jobs

SYSTEM = "You are a friendly assistant. You answer in simple words."
SYSTEM_PLAN = "Before answering, write a short plan for the answer in one or two sentences."
SYSTEM_PLANNED = "You are a friendly assistant. You answer in simple words and follow the plan."
SYSTEM_TEXT = "You write for children, in simple words."
LENGTHS = {"story": 260, "paragraph": 170, "poem": 110, "plan": 70, "user": 40}


def message(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def dialogue(turns: list[str]) -> str:
    return "".join(message("assistant" if i % 2 else "user", t) for i, t in enumerate(turns))


def opening(system: str, shots: list[list[str]]) -> str:
    return message("system", system) + "".join(dialogue(shot) for shot in shots)


class Director:
    """Turns jobs into requests, follows them through their turns, and hands finished lines to `write`."""

    def __init__(
        self, jobs: Iterator[dict[str, Any]], write: Callable[[dict[str, Any]], None], temperature: float
    ) -> None:
        self.jobs, self.write, self.temperature = jobs, write, temperature
        self.queue: deque[Request] = deque()
        self.rejected: Counter[str] = Counter()
        self.scores: dict[str, deque[float]] = {}
        self.lines: Counter[str] = Counter()

    def requests(self, want: int) -> list[Request]:
        """The next `want` requests: conversations under way before new jobs."""
        taken = []
        for _ in range(want):
            taken.append(self.queue.popleft() if self.queue else self._begin(next(self.jobs)))
        return taken

    def _begin(self, job: dict[str, Any]) -> Request:
        return {"chat": self._chat, "think": self._think, "text": self._text, "magpie": self._magpie}[job["kind"]](job)

    def _request(self, prefix: str, text: str, length: str, done: Done, heat: float = 0.0) -> Request:
        return Request(prefix, text, LENGTHS.get(length, 150), self.temperature + heat, done)

    def _keep(self, kind: str, line: dict[str, Any]) -> bool:
        self.lines[kind] += 1
        self.write(line)
        return True

    def _unlikely(self, key: str, score: float) -> bool:
        """Whether the teacher itself found its answer odd: in the lowest quarter of this category's last 300."""
        recent = self.scores.setdefault(key, deque(maxlen=300))
        recent.append(score)
        return len(recent) >= 20 and score < sorted(recent)[len(recent) // 4]

    def _checked(self, reply: str, ended: bool, score: float, job: dict[str, Any], turns: list[str]) -> str:
        """The cleaned answer, or "" with the reason counted."""
        text, reason = clean(reply, ended)
        if not reason and off_topic(text, job["topic"] if len(turns) == 1 else ""):
            reason = "off topic"
        if not reason and leaks(text, job, turns):
            reason = "talks of the example"
        if not reason and job["category"] == "news" and "sorry" in text.lower():
            reason = "sorry for good news"
        if not reason and "the user" in text.lower():
            reason = "speaks of the user"
        if not reason and any(alike(text, said) for said in turns[1::2]):
            reason = "same answer again"
        if not reason and job["category"] == "rewrite" and text.lower().rstrip(".") in turns[0].lower():
            reason = "nothing rewritten"
        if not reason and job["category"].startswith("list_") and len(turns) == 1 and text.count("\n") < 2:
            reason = "short list"
        if self._unlikely(f"{job['kind']} {job['category']} {len(turns)}", score) and not reason:
            reason = "unlikely"
        if reason:
            self.rejected[reason] += 1
            return ""
        return text

    def _chat(self, job: dict[str, Any], said: list[str] | None = None) -> Request:
        """The answer to the next user turn; `said` alternates user and assistant so far."""
        said = said or []
        turns = [*said, job["turns"][len(said) // 2]]

        def done(reply: str, ended: bool, score: float) -> bool:
            text = self._checked(reply, ended, score, job, turns)
            whole = [*turns, text] if text else said
            if text and len(whole) // 2 < len(job["turns"]):
                self.queue.append(self._chat(job, whole))
                return True
            if whole:
                roles = ("user", "assistant")
                messages = [{"role": roles[i % 2], "content": t} for i, t in enumerate(whole)]
                self._keep(f"chat, {len(whole) // 2} turns", {"messages": messages})
            return bool(text)

        prompt = dialogue(turns) + "<|im_start|>assistant\n"
        return self._request(opening(SYSTEM, job["shots"]), prompt, job["category"], done)

    def _think(self, job: dict[str, Any]) -> Request:
        """First a plan (unless the job brings one), then the answer that follows it."""
        question, start, plans = job["turns"][0], job["start"], job["plans"]
        if job["plan"]:
            return self._planned(job, job["plan"])

        def done(reply: str, ended: bool, score: float) -> bool:
            sentences = SENTENCE_END.split(reply.strip())
            text, reason = clean(f"{start} {reply.strip()}", ended)
            if not reason and (
                len(sentences) > 5 or "\n" in text or leaks(text, {"shots": [p[:1] for p in plans]}, [question, start])
            ):
                reason = "poor plan"
            if reason:
                self.rejected["plan: " + reason] += 1
                return False
            self.queue.append(self._planned(job, text))
            return True

        prompt = dialogue([question]) + "<|im_start|>assistant\n" + start
        return self._request(opening(SYSTEM_PLAN, [[q, p] for q, p, _ in plans]), prompt, "plan", done)

    def _planned(self, job: dict[str, Any], plan: str) -> Request:
        question = job["turns"][0]
        shots = [[f"{q}\n\nPlan: {p}", a] for q, p, a in job["plans"]]

        def done(reply: str, ended: bool, score: float) -> bool:
            text = self._checked(reply, ended, score, {**job, "shots": [p[::2] for p in job["plans"]]}, [question])
            if not text:
                return False
            answer = {"role": "assistant", "reasoning_content": plan, "content": text}
            return self._keep("think", {"messages": [{"role": "user", "content": question}, answer]})

        prompt = dialogue([f"{question}\n\nPlan: {plan}"]) + "<|im_start|>assistant\n"
        return self._request(opening(SYSTEM_PLANNED, shots), prompt, job["category"], done)

    def _text(self, job: dict[str, Any]) -> Request:
        start = job["start"]

        def done(reply: str, ended: bool, score: float) -> bool:
            text = self._checked(start + reply, ended, score, job, [job["turns"][0] + start])
            return bool(text) and len(text) > 150 and self._keep(job["category"], {"text": text})

        prompt = dialogue(job["turns"]) + "<|im_start|>assistant\n" + start
        return self._request(opening(SYSTEM_TEXT, job["shots"]), prompt, job["category"], done, heat=0.15)

    def _magpie(self, job: dict[str, Any]) -> Request:
        """The teacher writes the user's message, after `start`; then it answers it as in a chat."""

        def done(reply: str, ended: bool, score: float) -> bool:
            text, reason = clean(job["start"] + reply, ended)
            fine = 12 < len(text) < 160 and "\n" not in text and not re.search(r"\d", text) and text[-1] in ".?!"
            if reason or not fine or leaks(text, job, []):
                self.rejected["user turn: " + (reason or "poor")] += 1
                return False
            topic = max(WORD.findall(text.lower()), key=len)
            self.queue.append(self._chat({**job, "turns": [text], "shots": job["shots"][:2], "topic": topic}))
            return False

        prompt = "<|im_start|>user\n" + job["start"]
        return self._request(opening(SYSTEM, job["shots"]), prompt, "user", done, heat=0.3)


# ------------------------------------------------------------------------------------------------ the output


class Parts:
    """Lines into at most `parts` files of about equal time, each compressed in a thread while the next one fills."""

    def __init__(self, out: Path, seconds: float, parts: int = 7) -> None:
        self.out, self.each, self.last = out, seconds / parts, parts - 1
        self.pool = ThreadPoolExecutor(parts)  # lzma releases the interpreter lock
        self.jobs: list[Future[None]] = []
        self.lines: list[str] = []
        self.began = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        for old in out.glob("part-*.jsonl.xz"):
            old.unlink()

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(json.dumps(line, ensure_ascii=True))
        full = (time.monotonic() - self.began) > self.each * (len(self.jobs) + 1)
        if full and len(self.jobs) < self.last:
            self._rotate()

    def _rotate(self) -> None:
        if self.lines:
            path = self.out / f"part-{len(self.jobs)}.jsonl.xz"
            self.jobs.append(self.pool.submit(self._compress, path, self.lines))
            self.lines = []

    @staticmethod
    def _compress(path: Path, lines: list[str]) -> None:
        path.write_bytes(lzma.compress(("\n".join(lines) + "\n").encode(), preset=4))

    def close(self) -> None:
        self._rotate()
        for job in self.jobs:
            job.result()


def read_jobs(path: Path, rng: random.Random) -> Iterator[dict[str, Any]]:
    """All jobs in a shuffled order, again and again (a second answer to a prompt differs from the first)."""
    raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    lines = raw.decode("utf-8").splitlines()
    while True:
        rng.shuffle(lines)
        for line in lines:
            yield json.loads(line)


def generate(engine: Engine, director: Director, seconds: float, stride: int, report: Callable[[float], None]) -> float:
    """The loop: some steps on the GPU, meanwhile the texts of the rows that finished before. Returns seconds taken."""
    finished: list[tuple[Request, list[int], float]] = []
    ready: list[Request] = []
    began = last = time.monotonic()
    while (now := time.monotonic()) - began < seconds:
        if now - last > 10:
            last = now
            report(now - began)
        free = engine.free_rows()
        if len(ready) < len(free):
            ready += engine.prepare(director.requests(len(free) - len(ready)))
        use = min(len(free), len(ready))
        if use:
            engine.admit(free[:use], ready[:use])
            ready = ready[use:]
        for _ in range(stride):
            engine.step()
        engine.deliver(finished)  # while the GPU works
        ready += engine.prepare(director.requests(max(0, engine.n_rows // 8 - len(ready))))
        finished = engine.harvest()
    engine.deliver(finished)
    return time.monotonic() - began


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="the teacher's GGUF file")
    parser.add_argument("--gguf-parts", type=Path, nargs="+", help="the same in pieces, joined first")
    parser.add_argument("--prompts", type=Path, required=True, help="what prompts.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=250)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--bank", type=int, default=512, help="cache rows for prompt beginnings that are shared")
    parser.add_argument("--cache", type=int, default=640, help="tokens a row can hold, a multiple of 64")
    parser.add_argument("--temperature", type=float, default=0.45)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--penalty", type=float, default=1.1, help="on tokens the answer already has")
    parser.add_argument("--stride", type=int, default=12, help="steps between two looks at what has finished")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def load_gguf(args: argparse.Namespace) -> GGUFReader:
    if args.gguf:
        return GGUFReader(args.gguf)
    if not args.gguf_parts:
        raise SystemExit("give --gguf FILE or --gguf-parts A B")
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "teacher.gguf"
        with whole.open("wb") as file:
            for part in args.gguf_parts:
                file.write(part.read_bytes())
        return GGUFReader(whole)


def build(args: argparse.Namespace) -> Engine:
    began = time.monotonic()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    gguf = load_gguf(args)
    bank = args.bank if device.type == "cuda" else min(args.bank, 48)
    teacher = Teacher(gguf, args.batch, bank, args.cache, device, dtype)
    engine = Engine(teacher, read_tokenizer(gguf.meta), max(LENGTHS.values()), args.top_p, args.penalty)
    engine.capture()
    say(f"teacher ready in {time.monotonic() - began:.1f} s: {device}, {teacher.attention} attention, {engine.mode}")
    return engine


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))  # so that `finally` writes what is there
    engine = build(args)
    parts = Parts(args.out, args.seconds)
    director = Director(read_jobs(args.prompts, random.Random(args.seed)), parts.write, args.temperature)

    def report(elapsed: float) -> None:
        say(
            f"{elapsed:6.0f} s  {engine.generated / 1e6:7.3f} M tokens ({engine.generated / elapsed:,.0f}/s), "
            f"kept {engine.kept / 1e6:.3f} M ({engine.kept / max(engine.generated, 1):.0%}), "
            f"prefilled {engine.prefilled / 1e6:.2f} M, {sum(director.lines.values())} lines"
        )

    began, problem = time.monotonic(), ""
    try:
        generate(engine, director, args.seconds, args.stride, report)
    except Exception:
        problem = traceback.format_exc()
        say(problem)
    finally:
        elapsed = time.monotonic() - began
        parts.close()
        stats = {
            "seconds": round(elapsed, 1),
            "generated_tokens": engine.generated,
            "kept_tokens": engine.kept,
            "tokens_per_s": round(engine.generated / elapsed),
            "prefix_bank": len(engine.prefixes),
            "lines": dict(director.lines.most_common()),
            "rejected": dict(director.rejected.most_common()),
            "attention": engine.teacher.attention,
            "step": engine.mode,
            "arguments": {k: str(v) for k, v in vars(args).items()},
            "problem": problem,
        }
        (args.out / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
        say(json.dumps(stats, indent=2))
    sys.exit(1 if problem else 0)


if __name__ == "__main__":
    main()
