"""The runner over the CPU kernels: a planned step becomes one call for all its tokens, whatever slices they belong to.

The contract that `deterministic` stands for: a token's hidden state follows from the tokens before it and its own
position, bit for bit, because the kernels add in an order that nothing else can change (`ops.native`). So a request gives
the same tokens and the same log-probabilities alone or in any batch, in any chunking, from a cold, warm or disk cache,
with drafts or without, before and after a preemption, with any number of threads.

Drafts come from the model's MTP module: it reads the hidden state at a position and the token after it, and keeps latents
of its own in the same pages. Chained drafts feed its output back. A position whose step was not drafted after leaves a gap
there, which can cost acceptance and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rorqual.engine.core import Draw, Masks
from rorqual.engine.native import NativeModel, StepTokens
from rorqual.engine.runner import FAULT, zeros
from rorqual.engine.sampler import Row, sample
from rorqual.engine.scheduler import Slice


class NativeRunner:
    """Owns the latent cache of `model`, fp32 [layers + MTP modules, pages, 64, C + R rounded up]; satisfies `core.Runner`.

    draft_depth: how many drafts it may chain (0 without an MTP module); eos: ids that `min_tokens` holds back; loads: tokens
    each expert has had, int64 [layers, E + 1], the last column counting experts that had any, step by step.
    """

    def __init__(self, model: NativeModel, num_pages: int, page_size: int, eos: tuple[int, ...] = ()) -> None:
        assert page_size == 64, "the kernels' page"
        cfg = model.cfg
        self.model, self.page_size, self.eos = model, page_size, eos
        self.layers = cfg.num_hidden_layers + len(model.mtp)
        self.latents = zeros((self.layers, num_pages, page_size, model.row_width), torch.float32, torch.device("cpu"))
        self.draft_depth = 3 if model.mtp else 0
        self.page_bytes = self.latents[:, 0].numel() * 4
        self.loads = np.zeros((cfg.num_hidden_layers, (cfg.n_routed_experts or 0) + 1), np.int64)
        self.read_bytes = 0.0
        self.on_device = False
        self._hidden: Tensor | None = None
        self._offsets: dict[int, int] = {}

    @torch.inference_mode()
    def run(self, plan: Sequence[Slice], masks: Masks | None = None) -> list[list[Draw]]:
        tokens = StepTokens([(s.tokens, s.start, s.job.pages) for s in plan])
        counts = [s.count + len(s.drafts) for s in plan]
        busy = int(self.loads[:, -1].sum())
        h = self.model.forward(tokens, self.latents, self.loads)
        busy = int(self.loads[:, -1].sum()) - busy
        seen = sum(s.start for s in plan) + len(tokens)
        self.read_bytes += self.model.step_bytes(busy) + seen * self.page_bytes / self.page_size
        ends = np.cumsum(counts)
        self._hidden = h
        self._offsets = {id(s): int(end) - n for s, end, n in zip(plan, ends, counts, strict=True)}
        # A fault anywhere in a slice reaches its last position through attention.
        # Of a slice with drafts the last before them: what a draft leads to counts only where it stands.
        lasts = ends - 1 - np.array([len(s.drafts) for s in plan])
        last = h if len(h) == len(plan) else h[torch.from_numpy(lasts)]
        sound = np.isfinite(last.numpy().sum(-1)).tolist()
        drawing = [i for i, s in enumerate(plan) if s.samples and sound[i]]
        draws: list[list[Draw]] = [[] if ok else [Draw(fault=FAULT)] for ok in sound]
        if not drawing:
            return draws
        at = [int(ends[i]) - 1 - len(plan[i].drafts) + j for i in drawing for j in range(len(plan[i].drafts) + 1)]
        logits = self.model.logits(h if len(at) == len(h) else h[at])
        allowed = masks() if masks else None
        rows: list[Row] = []
        for i in drawing:
            s = plan[i]
            params, seed, before, prompt = s.job.request.params, s.job.seed, s.job.tokens, len(s.job.request.prompt)
            for j in range(len(s.drafts) + 1):
                mask = allowed[i][j] if allowed and allowed[i] else None
                rows.append(Row(params, seed, [*before, *s.drafts[:j]] if j else before, prompt, mask, self.eos))
        drawn = iter(sample(logits, rows, self.model.draw))
        for i in drawing:
            draws[i] = [next(drawn) for _ in range(len(plan[i].drafts) + 1)]
        return draws

    @torch.inference_mode()
    def draft(self, done: Sequence[tuple[Slice, int]], depth: int) -> list[tuple[int, ...]]:
        assert self._hidden is not None
        at_rows: list[int] = []
        counts, asking = [], []
        for i, (s, new) in enumerate(done):
            n = s.count + max(new - 1, 0)  # positions whose hidden state stands
            at_rows += range(self._offsets[id(s)], self._offsets[id(s)] + n)
            counts.append(n)
            if new:
                asking.append(i)
        h = self._hidden if len(at_rows) == len(self._hidden) else self._hidden[at_rows]
        tokens = StepTokens(
            [
                (s.job.tokens[s.start + 1 : s.start + n + 1], s.start, s.job.pages)
                for (s, _), n in zip(done, counts, strict=True)
            ]
        )
        out = self.model.predict(0, tokens, h, self.latents)
        drafts: list[list[int]] = [[] for _ in done]
        if asking:
            h = out[torch.from_numpy(np.cumsum(counts)[asking] - 1)]
        at = [done[i][0].start + counts[i] for i in asking]  # the newest token's position, not computed yet
        for step in range(depth if asking else 0):
            guesses = self._best(h)
            for i, guess in zip(asking, guesses, strict=True):
                drafts[i].append(guess)
            # The next link writes its latent at the newest token's position, where that has a page already.
            going = [k for k, i in enumerate(asking) if at[k] // self.page_size < len(done[i][0].job.pages)]
            if step + 1 == depth or not going:
                break
            asking, at, h = [asking[k] for k in going], [at[k] for k in going], h[going]
            tokens = StepTokens([([drafts[i][-1]], p, done[i][0].job.pages) for i, p in zip(asking, at, strict=True)])
            h = self.model.predict(0, tokens, h, self.latents)
            at = [p + 1 for p in at]
        return [tuple(d) for d in drafts]

    def _best(self, h: Tensor) -> list[int]:
        # numpy's argmax is vectorised on a CPU, torch's is not.
        return [int(row.argmax()) for row in self.model.logits(h).numpy()]

    def wipe(self, pages: Sequence[int]) -> None:
        self.latents[:, [0, *pages]] = 0

    def shrink(self) -> int:
        return 0  # an operating system does not say that memory is short

    def read_page(self, page: int) -> bytes:
        return self.latents[:, page].numpy().tobytes()

    def write_page(self, page: int, data: bytes) -> None:
        shape = (self.layers, self.page_size, self.model.row_width)
        self.latents[:, page] = torch.frombuffer(bytearray(data), dtype=torch.float32).view(shape)

    @torch.inference_mode()
    def idle_step(self) -> None:
        """One decoding step over the scrap page, to warm up or to time."""
        h = self.model.forward(StepTokens([([0], 0, [0])]), self.latents)
        self.model.logits(h)
