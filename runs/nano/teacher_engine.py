"""The generation loop around the teacher: one batch that is refilled row by row, and never waits for its longest row.

Why this way: at 135 M parameters everything around the matrix products decides the speed. So one CUDA graph holds the
whole step, sampling included; a finished row is replaced at once; prompts that begin alike are computed once and copied
(the bank); and texts are decoded, judged and tokenised while the GPU runs the next steps. Where no graph can be
captured, the same step runs eagerly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from teacher import Teacher, say
from tokenizers import Tokenizer


def penalise(logits: torch.Tensor, written: torch.Tensor, count: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make the tokens a row has already written less likely: positive logits / penalty, negative ones * penalty.

    logits [B, V], changed in place; written [B, max_new], valid below count [B]. A weak teacher loops without it.
    """
    valid = torch.arange(written.shape[1], device=written.device)[None, :] < count[:, None]
    ids = torch.where(valid, written, written[:, :1])  # the rest points at a token that is penalised anyway
    seen = logits.gather(1, ids)
    seen = torch.where(seen > 0, seen / penalty, seen * penalty)
    keep = logits.gather(1, ids[:, :1])
    logits.scatter_(1, ids, seen)
    fresh = (count == 0)[:, None]  # nothing written yet: column 0 is stale, put its logit back
    return logits.scatter_(1, ids[:, :1], torch.where(fresh, keep, seen[:, :1]))


def sample(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: float, top_k: int = 50
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [B, V] -> (token [B], its log-probability among the top k at temperature 1 [B]).

    Top-p among the top k: sorting 49,152 logits of every row would cost more than the model.
    """
    values, ids = logits.topk(top_k, dim=-1)
    values = values.float()
    probs = torch.softmax(values / temperature[:, None], -1)
    probs = probs.masked_fill(probs.cumsum(-1) - probs > top_p, 0.0)
    choice = (probs / torch.empty_like(probs).exponential_()).argmax(-1, keepdim=True)
    return ids.gather(1, choice).squeeze(1), torch.log_softmax(values, -1).gather(1, choice).squeeze(1)


# ------------------------------------------------------------------------------------------------- the engine


Done = Callable[[str, bool, float], bool]


@dataclass
class Request:
    """One generation: `prefix` (shared by many) + `text` go to the teacher verbatim.

    `done(reply, ended, score)` takes what it wrote and the mean log-probability of that, and says whether it is kept.
    """

    prefix: str
    text: str
    max_new: int
    temperature: float
    done: Done
    ids: list[int] = field(default_factory=list)
    start: int = 0  # how many tokens of the prompt come from the bank
    bank_row: int = 0


class Engine:
    """A fixed batch of rows, each at its own position; finished rows are replaced by prepared requests."""

    def __init__(self, teacher: Teacher, tok: Tokenizer, max_new: int, top_p: float, penalty: float) -> None:
        self.teacher, self.tok, self.top_p, self.penalty = teacher, tok, top_p, penalty
        device, rows = teacher.embed.device, teacher.rows
        self.device, self.n_rows, self.cache_len = device, rows, teacher.k.shape[3]
        self.stop = tok.token_to_id("<|im_end|>")
        self.also_stop = tok.token_to_id("<|endoftext|>")

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.rows = torch.arange(rows, device=device)
        self.token, self.pos, self.count, self.limit = zeros(rows), zeros(rows), zeros(rows), zeros(rows)
        self.idle = zeros(rows, dtype=torch.bool).fill_(True)
        self.temperature = zeros(rows, dtype=torch.float32).fill_(1.0)
        self.score = zeros(rows, dtype=torch.float32)  # sum of the chosen tokens' log-probabilities
        self.out = zeros(rows, max_new)
        self.owner: list[Request | None] = [None] * rows
        self.prefixes: dict[str, tuple[int, int]] = {}  # text -> bank row, tokens
        self.generated = self.kept = self.prefilled = 0
        self.step: Callable[[], None] = self._step
        self.mode = "eager"

    @torch.inference_mode()
    def _step(self) -> None:
        """One token for every busy row, in place; idle rows compute along and change nothing that is read."""
        logits = self.teacher.decode(self.token, self.pos, self.rows)
        logits = penalise(logits, self.out, self.count, self.penalty)
        new, log_prob = sample(logits, self.temperature, self.top_p)
        busy = ~self.idle
        self.score += log_prob * busy
        at = self.count.clamp(max=self.out.shape[1] - 1)
        self.out[self.rows, at] = torch.where(busy, new, self.out[self.rows, at])
        self.token.copy_(torch.where(busy, new, self.token))
        self.count += busy
        self.idle |= (new == self.stop) | (new == self.also_stop) | (self.count >= self.limit)
        self.pos += ~self.idle

    @torch.inference_mode()
    def capture(self) -> None:
        """Record the step as one CUDA graph; on any trouble stay eager (about 1.5 times slower, not wrong)."""
        if self.device.type != "cuda":
            return
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

    def prepare(self, requests: list[Request]) -> list[Request]:
        """Tokenise; those that do not fit the cache are answered at once with nothing."""
        for request, encoding in zip(requests, self.tok.encode_batch([r.text for r in requests]), strict=True):
            request.ids = encoding.ids
            request.bank_row, request.start = self._banked(request.prefix)
            if not request.start:
                request.ids = self.tok.encode(request.prefix).ids + request.ids
        room = self.cache_len - self.out.shape[1]
        fitting = [r for r in requests if r.start + len(r.ids) <= room]
        for request in requests:
            if request.start + len(request.ids) > room:
                request.done("", False, 0.0)
        return fitting

    @torch.inference_mode()
    def _banked(self, prefix: str) -> tuple[int, int]:
        """(bank row, tokens) of a shared prompt beginning, computed when first seen; (0, 0) when the bank is full."""
        if prefix not in self.prefixes and len(self.prefixes) < self.teacher.bank:
            ids = self.tok.encode(prefix).ids
            row = self.n_rows + len(self.prefixes)
            tokens = torch.tensor([ids], device=self.device)
            start = torch.zeros(1, dtype=torch.long, device=self.device)
            self.teacher.extend(tokens, start, torch.tensor([row], device=self.device), len(ids))
            self.prefixes[prefix] = (row, len(ids))
        return self.prefixes.get(prefix, (0, 0))

    @torch.inference_mode()
    def admit(self, free: list[int], requests: list[Request]) -> None:
        """Start `requests` (prepared) in rows `free` (as many), in chunks of similar prompt length."""
        pairs = sorted(zip(free, requests, strict=True), key=lambda pair: len(pair[1].ids))
        for i in range(0, len(pairs), 256):
            self._admit_chunk(pairs[i : i + 256])

    def _admit_chunk(self, pairs: list[tuple[int, Request]]) -> None:
        longest = max(len(r.ids) for _, r in pairs)
        padded = torch.tensor([r.ids + [0] * (longest - len(r.ids)) for _, r in pairs]).to(self.device)
        columns = [
            (row, r.bank_row, r.start, r.ids[-1], r.start + len(r.ids) - 1, min(r.max_new, self.out.shape[1]))
            for row, r in pairs
        ]
        rows, bank, start, token, pos, limit = torch.tensor(columns).to(self.device).unbind(1)
        shared = max(r.start for _, r in pairs)
        if shared:  # rows without a banked prefix copy row 0's and overwrite it
            self.teacher.copy(bank, rows, shared)
        self.teacher.extend(padded, start, rows, shared + longest)
        self.token[rows], self.pos[rows], self.limit[rows] = token, pos, limit
        self.temperature[rows] = torch.tensor([r.temperature for _, r in pairs], device=self.device)
        self.count[rows] = 0
        self.score[rows] = 0.0
        self.idle[rows] = False
        self.prefilled += padded.numel()
        for row, request in pairs:
            self.owner[row] = request

    def harvest(self) -> list[tuple[Request, list[int], float]]:
        """Waits for the GPU; takes the finished rows' tokens and mean log-probability, and frees the rows."""
        idle = self.idle.tolist()
        rows = [r for r in range(self.n_rows) if idle[r] and self.owner[r] is not None]
        if not rows:
            return []
        index = torch.tensor(rows, device=self.device)
        counts, out, scores = (t[index].tolist() for t in (self.count, self.out, self.score))
        finished = []
        for row, n, ids, score in zip(rows, counts, out, scores, strict=True):
            request = self.owner[row]
            assert request is not None
            finished.append((request, ids[:n], score / max(n, 1)))
            self.owner[row] = None
            self.generated += n
        return finished

    def deliver(self, finished: list[tuple[Request, list[int], float]]) -> None:
        """Texts to whoever asked. A reply that met its limit has not ended."""
        for request, ids, score in finished:
            ended = ids[-1] in (self.stop, self.also_stop)
            if request.done(self.tok.decode(ids[:-1] if ended else ids), ended, score):
                self.kept += len(ids)

    def free_rows(self) -> list[int]:
        return [r for r, owner in enumerate(self.owner) if owner is None]
