"""The teacher writes: conversations and free text, thousands of rows in lockstep, never waiting for one.

    python runs/bundled/generate.py --gguf smollm2.gguf --asks asks.jsonl.xz --text text --out dialogues --seconds 150

Every row follows a script: tokens it is given (a system prompt, a question, the start of the next question, the opening
of a text), and places where the teacher speaks until it ends its turn. All rows stand at the same position, so a wave is
one CUDA graph replayed `length` times, with nothing to refill and no prompt to compute apart: given tokens cost a step
like spoken ones. A row whose script is used up goes on with questions that the teacher asks itself. Texts are cut into
conversations in other processes while the next wave runs.

What is kept: whole turns, up to the first answer that repeats itself or says who the teacher is. Plain text starts from
a few words of real text, literature as often as not, or from first words of many kinds (`openings.py`).
Compiled attention and the network are `runs/nano/teacher.py`'s.
"""

from __future__ import annotations

import argparse
import json
import lzma
import multiprocessing
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "nano")]

from asks import passage, read_texts  # noqa: E402
from openings import opening  # noqa: E402
from teacher import GGUFReader, Teacher, read_tokenizer, say  # noqa: E402

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SPEAK, END = -1, -2
STARTS = ["", "", "", "What", "How", "Can you", "Why", "I", "Tell me", "Is", "Explain", "Write", "Give me", "Who", "My"]
TURN = re.compile(r"<\|im_start\|>(system|user|assistant)\n(.*?)<\|im_end\|>", re.DOTALL)
SELF = re.compile(
    r"\bmy name is\b|\bI(?:'m| am) (?:an?|the|your|just an?) (?:[\w-]+ ){0,4}(?:AI|assistant|chatbot|language model|program)\b"
    r"|SmolLM|Hugging Face",
    re.IGNORECASE,
)
"""Who the teacher says it is; the student is to say who *it* is, which lessons teach."""
SPECIALS = 17
"""Ids below are special tokens; the teacher may say only the two that end something."""


# ---- scripts -----------------------------------------------------------------------------------------------------


def script(
    rng: random.Random, asks: Iterator[dict[str, Any]], texts: list[str], literature: list[str]
) -> tuple[str, list[str]]:
    """(kind, pieces between which the teacher speaks). Of the texts a third go on from an opening that was made up, a third
    from literature."""
    if rng.random() < 0.3:
        real = rng.choice([texts, literature, None])
        starts = [
            " ".join(passage(rng, real, 60).split(" ")[: rng.randint(3, 40)]) if real else opening(rng)
            for _ in range(3)
        ]
        return "text", ["<|endoftext|>" + starts[0], *starts[1:]]
    pieces = [f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"]
    if rng.random() < 0.2:  # the teacher asks
        pieces[0] += "<|im_start|>user\n" + rng.choice(STARTS)
        pieces.append("\n<|im_start|>assistant\n")
    else:
        for i, turn in enumerate(next(asks)["turns"]):
            said = turn.replace("{passage}", passage(rng, texts)) if "{passage}" in turn else turn
            given = f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
            pieces = [pieces[0] + given] if i == 0 else [*pieces, "\n" + given]
    for _ in range(3):
        pieces += ["\n<|im_start|>user\n" + rng.choice(STARTS), "\n<|im_start|>assistant\n"]
    return "chat", pieces


def read_asks(path: Path, rng: random.Random) -> Iterator[dict[str, Any]]:
    lines = lzma.decompress(path.read_bytes()).decode().splitlines()
    while True:
        rng.shuffle(lines)
        yield from map(json.loads, lines)


def wave_of(
    make: Callable[[], tuple[str, list[str]]], tok: Tokenizer, rows: int, length: int
) -> tuple[list[str], torch.Tensor]:
    """Scripts of one wave as ids [rows, Q]; each piece is followed by SPEAK, the last by END."""
    scripts = [make() for _ in range(rows)]
    flat = iter(tok.encode_batch_fast([p for _, pieces in scripts for p in pieces], add_special_tokens=False))
    queue = np.full((rows, length + 2), END, dtype=np.int32)
    for row, (_, pieces) in zip(queue, scripts, strict=True):
        ids = [i for _ in pieces for i in (*next(flat).ids, SPEAK)][:length]
        row[: len(ids)] = ids
    return [kind for kind, _ in scripts], torch.from_numpy(queue)


# ---- the wave ----------------------------------------------------------------------------------------------------


class Waves:
    """The teacher over `rows` rows of `length` tokens. All state lives on the device; `run` fills `out`."""

    def __init__(self, teacher: Teacher, length: int, temperatures: list[float], min_p: float) -> None:
        device, rows = teacher.embed.device, teacher.rows
        self.teacher, self.length, self.min_p = teacher, length, min_p
        self.rows = torch.arange(rows, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.token = torch.zeros(rows, dtype=torch.long, device=device)
        self.at = torch.zeros(rows, dtype=torch.long, device=device)
        self.queue = torch.full((rows, length + 2), END, dtype=torch.int32, device=device)
        self.out = torch.zeros(length, rows, dtype=torch.int32, device=device)
        t = torch.tensor(temperatures, device=device)
        self.temperature = t[torch.arange(rows, device=device) % len(t)][:, None]
        self.step: Callable[[], None] = self._step
        self.mode = "eager"

    @torch.inference_mode()
    def _step(self) -> None:
        """From the token at `position` to the next one, given or spoken."""
        position = self.position.expand(len(self.rows))
        logits = self.teacher.decode(self.token, position, self.rows).float()
        logits[:, 3:SPECIALS] = float("-inf")
        logits[:, 1] = float("-inf")
        p = (logits / self.temperature).softmax(-1)
        p = p.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), 0.0)
        spoken = (p / torch.empty_like(p).exponential_()).argmax(-1)
        given = self.queue.gather(1, self.at[:, None]).squeeze(1).long()
        token = torch.where(given >= 0, given, spoken)
        ended = (given == SPEAK) & ((spoken == 0) | (spoken == 2))
        self.at += (given >= 0) | ended
        self.token.copy_(token)
        self.position += 1
        self.out.index_copy_(0, self.position, token[None].int())

    @torch.inference_mode()
    def start(self, queue: torch.Tensor) -> None:
        self.queue.copy_(queue, non_blocking=True)
        self.at.fill_(1)
        self.position.zero_()
        self.token.copy_(self.queue[:, 0])
        self.out[0] = self.queue[:, 0]

    def run(self, queue: torch.Tensor) -> np.ndarray:
        """[rows, length] tokens; waits for the device."""
        self.start(queue)
        for _ in range(self.length - 1):
            self.step()
        return self.out.T.contiguous().cpu().numpy()

    @torch.inference_mode()
    def capture(self, queue: torch.Tensor) -> None:
        """The step as one CUDA graph; on trouble it stays eager: slower, not wrong."""
        if self.token.device.type != "cuda":
            return
        self.start(queue)
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            graph.replay()
            torch.cuda.synchronize()
            self.step, self.mode = graph.replay, "cuda graph"
        except Exception as problem:
            say(f"graph capture failed ({type(problem).__name__}: {problem}): eager steps")
            torch.cuda.synchronize()


# ---- what is kept ------------------------------------------------------------------------------------------------


def repeats(text: str, n: int = 8, share: float = 0.15) -> bool:
    """Whether more than a share of its n-grams of words occurred before, or one word fills a line."""
    words = text.split()
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    looped = len(grams) > 8 and len(set(grams)) < (1 - share) * len(grams)
    lines = [x.strip() for x in text.split("\n") if x.strip()]
    return looped or (len(lines) > 5 and len(set(lines)) < 0.7 * len(lines))


def conversation(text: str) -> list[dict[str, str]]:
    """Whole turns of a row, as messages; empty where not one question was answered well."""
    turns = [(role, said.strip("\n")) for role, said in TURN.findall(text) if role != "system"]
    messages: list[dict[str, str]] = []
    for (asks, question), (answers, answer) in zip(turns[::2], turns[1::2], strict=False):
        good = (asks, answers) == ("user", "assistant") and question.strip() and answer.strip()
        if not good or repeats(answer) or repeats(question) or SELF.search(answer):
            break
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def keep(tok_json: str, kinds: list[str], tokens: np.ndarray, folder: str, wave: str) -> tuple[int, int]:
    """Write a wave's lines: conversations and texts in files of their own. (conversations, texts)."""
    tok = Tokenizer.from_str(tok_json)
    rows = tok.decode_batch(tokens.tolist(), skip_special_tokens=False)
    chats = [m for kind, row in zip(kinds, rows, strict=True) if kind == "chat" and (m := conversation(row))]
    texts = [
        t for kind, row in zip(kinds, rows, strict=True) if kind == "text"
        for t in re.split(r"<\|endoftext\|>|<\|im_end\|>", row) if len(t) > 200 and not repeats(t)
    ]  # fmt: skip
    for name, lines in (("chat", [{"messages": m} for m in chats]), ("text", [{"text": t} for t in texts])):
        path = Path(folder) / name / f"wave-{wave}.jsonl"
        path.with_suffix(".part").write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
        path.with_suffix(".part").rename(path)
    return len(chats), len(texts)


# ---- the run -----------------------------------------------------------------------------------------------------


def generate(
    waves: Waves, tok: Tokenizer, make: Callable[[], tuple[str, list[str]]], first: int, o: argparse.Namespace
) -> dict[str, Any]:
    """Waves until the time is up (never a new one that would end after it). Returns what is worth recording."""
    for name in ("chat", "text"):
        (o.out / name).mkdir(parents=True, exist_ok=True)
    began, each, done, stored = time.monotonic(), 0.0, 0, list[Future[tuple[int, int]]]()
    rows, spelled = waves.teacher.rows, tok.to_str()
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ThreadPoolExecutor(1) as ahead, ProcessPoolExecutor(o.workers, mp_context=context) as pool:
        coming = ahead.submit(wave_of, make, tok, rows, o.length)
        while done < 1 or time.monotonic() - began + each < o.seconds:
            kinds, queue = coming.result()
            if not done:
                waves.capture(queue)
            coming = ahead.submit(wave_of, make, tok, rows, o.length)
            start = time.monotonic()
            tokens = waves.run(queue)
            each, done = time.monotonic() - start, done + 1
            stored.append(pool.submit(keep, spelled, kinds, tokens, str(o.out), f"{o.seed:02}-{first + done:03}"))
            say(
                f"{time.monotonic() - began:6.1f} s  wave {done}: {each:.2f} s, {rows * o.length / each:,.0f} tokens/s, "
                f"{waves.mode}, {waves.teacher.attention}"
            )
            if o.waves and done >= o.waves:
                break
        counts = [f.result() for f in stored]
    return {
        "seconds": round(time.monotonic() - began, 1), "waves": done, "rows": rows, "length": o.length,
        "tokens": done * rows * o.length, "conversations": sum(c for c, _ in counts), "texts": sum(t for _, t in counts),
        "step": waves.mode, "attention": waves.teacher.attention,
    }  # fmt: skip


def answer(waves: Waves, tok: Tokenizer, files: list[Path], out: Path) -> None:
    """The teacher's answer to every "prompt" (sampled) or "question" (greedy) in the files, one wave for all."""
    asked = [json.loads(line) for f in files for line in f.read_text(encoding="utf-8").splitlines()]
    head = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    scripts = [
        ("chat", [f"{head}{x.get('prompt') or x['question']}<|im_end|>\n<|im_start|>assistant\n"]) for x in asked
    ]
    spare = waves.teacher.rows - len(scripts)
    if spare < 0:
        raise SystemExit(f"{len(scripts)} prompts need --rows {len(scripts)} or more")
    coming = iter(scripts + scripts[:1] * spare)
    _, queue = wave_of(lambda: next(coming), tok, waves.teacher.rows, waves.length)
    greedy = torch.tensor(["prompt" not in x for x in asked] + [True] * spare, device=waves.temperature.device)
    waves.temperature = torch.where(greedy[:, None], 1e-3, waves.temperature)
    rows = tok.decode_batch(waves.run(queue)[: len(asked)].tolist(), skip_special_tokens=False)
    lines = []
    for x, row in zip(asked, rows, strict=True):
        said = row.split("<|im_start|>assistant\n", 1)[-1]
        text, end, _ = said.partition("<|im_end|>")
        lines.append(json.dumps({**x, "answer": text.split("<|endoftext|>")[0], "ended": bool(end)}))
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    say(f"{out}: {len(lines)} answers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--asks", type=Path)
    parser.add_argument("--text", type=Path, help="folder of .jsonl with real text")
    parser.add_argument("--answer", type=Path, nargs="+", help="only answer what these files ask, into the file --out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--waves", type=int, default=0, help="at most so many; 0: until the time is up")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--length", type=int, default=640)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.8, 0.8, 0.8, 1.0])
    parser.add_argument("--min-p", type=float, default=0.02)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    o = parser.parse_args()
    # Another writer has another seed, and one that goes on does not begin again.
    first = len(list((o.out / "chat").glob(f"wave-{o.seed:02}-*.jsonl"))) if not o.answer else 0
    torch.manual_seed(1000 * o.seed + first)
    device = torch.device(o.device)
    gguf = GGUFReader(o.gguf)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tok = read_tokenizer(gguf.meta)
    rng = random.Random(f"{o.seed}/{first}")
    if o.answer:
        waves = Waves(Teacher(gguf, o.rows, 0, o.length, device, dtype), o.length, [0.7], o.min_p)
        answer(waves, tok, o.answer, o.out)
        return
    asks, texts, literature = read_asks(o.asks, rng), read_texts(o.text), read_texts(o.text, "prose-*.jsonl")
    waves = Waves(Teacher(gguf, o.rows, 0, o.length, device, dtype), o.length, o.temperatures, o.min_p)
    record = generate(waves, tok, lambda: script(rng, asks, texts, literature), first, o)
    record["options"] = {k: str(v) for k, v in vars(o).items()}
    (o.out / f"generate-{o.seed}.json").write_text(json.dumps(record, indent=1) + "\n")
    say(json.dumps(record))


if __name__ == "__main__":
    main()
