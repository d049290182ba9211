"""Distillation: the training loop over rows whose targets are a teacher's whole distributions.

    rows -> student's hidden states --------------------> chunked divergence -> update
         -> the teacher's spelling -> teacher's hidden states -^

It heals a converted model (`post.upcycle`), and compresses one model of this package into another of the same
vocabulary. Sources marked target = "data" are learned from their own tokens instead: lessons that the teacher could not
have written. MTP modules learn the model's own next distributions, which is what a draft is compared with, jointly, or
afterwards with the model frozen (then there is no teacher to run).

The loop, its records and its checkpoints are `train.pretrain`'s: the same command resumes a killed run, to the bit.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rorqual.checkpoint import load_model
from rorqual.checkpoint.hf import DTYPES
from rorqual.data.tokenizer import Tokenizer, read_json
from rorqual.errors import ConfigError
from rorqual.model.batch import Batch, Routing
from rorqual.model.transformer import Transformer
from rorqual.post.distill_loss import Target, divergence
from rorqual.post.expand import Expansion
from rorqual.post.llama_files import load_llama, open_llama
from rorqual.post.llama_tokenizer import TokenizerFiles
from rorqual.train.config import DistillConfig, RunConfig
from rorqual.train.loss import Losses, Targets, balance_guard
from rorqual.train.pretrain import RunRecord, pretrain
from rorqual.train.replicas import ALONE, Replicas

log = logging.getLogger(__name__)


class Teacher(Protocol):
    """What `model.transformer.Transformer` and `post.llama.Llama` have in common."""

    def hidden(self, tokens_BT: Tensor, batch: Batch | None = None) -> tuple[Tensor, list[Routing]]: ...

    def head(self, h_BTD: Tensor) -> Tensor: ...


def distill(cfg: RunConfig, say: Callable[[str], None] = log.info, replicas: Replicas = ALONE) -> RunRecord:
    """Run or resume a distillation. Raises ConfigError where the file names no teacher it needs, or one of another
    vocabulary, and whatever `pretrain` raises."""
    if cfg.distill is None or not cfg.init_from:
        raise ConfigError("distillation needs init_from and a section [distill]", remedy="see docs/upcycle.md")
    return pretrain(cfg, kind="distill", say=say, make_loss=make_loss, replicas=replicas)


def make_loss(cfg: RunConfig, model: Transformer) -> Distillation:
    """The loss of a resolved run. The teacher is loaded only where something of the model itself is trained."""
    settings = cfg.distill
    assert settings is not None
    own = [name for name, _ in model.named_parameters() if not name.startswith("mtp.")]
    needed = not all(any(fnmatch(name, pattern) for pattern in cfg.freeze) for name in own)
    if not needed:
        return Distillation(settings, None, None)
    if not settings.teacher:
        raise ConfigError("distill.teacher is empty", remedy="name a teacher, or freeze all but mtp.*")
    dtype = DTYPES[cfg.dtype if settings.teacher_dtype == "auto" else settings.teacher_dtype]
    teacher, vocab = load_teacher(settings.teacher, dtype, model.device)
    if vocab > model.cfg.vocab_size:
        raise ConfigError(
            f"the teacher has {vocab} words, the model {model.cfg.vocab_size}", remedy="distil within one vocabulary"
        )
    table = expansion_table(settings, cfg.data.tokenizer or cfg.init_from)
    return Distillation(settings, teacher, Expansion(table, model.cfg.vocab_size, model.device))


def load_teacher(path: str, dtype: torch.dtype, device: torch.device) -> tuple[Teacher, int]:
    """A Llama-family model or one of ours, and the size of its vocabulary."""
    if _is_llama(path):
        llama = load_llama(path, dtype, device)
        return llama, llama.cfg.vocab_size
    model = load_model(path, dtype, device).requires_grad_(False)
    return model, model.cfg.vocab_size


def expansion_table(settings: DistillConfig, student: str) -> dict[int, list[int]]:
    """`expand` as ids. Raises DataError for a token the student has not."""
    if not settings.expand:
        return {}
    if _is_llama(settings.teacher):
        files = open_llama(settings.teacher).tokenizer
    else:
        folder = Path(settings.teacher)
        files = TokenizerFiles(read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json"))
    if files is None:
        raise ConfigError(f"{settings.teacher} has no tokenizer", remedy="distill.expand needs the teacher's")
    tokenizer = Tokenizer.load(student)
    return {tokenizer.special(name): files.encode(text) for name, text in settings.expand.items()}


def _is_llama(path: str) -> bool:
    config = Path(path) / "config.json"
    if not config.is_file():
        return True  # a GGUF file, or something whose reader will say what is wrong
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") in ("llama", "mistral")
    except ValueError as error:
        raise ConfigError(f"{config} is not valid JSON: {error}", remedy="restore the file") from None


class Distillation:
    """A step's loss, called as `train.loss.losses` is. teacher None: only MTP modules are trained."""

    def __init__(self, settings: DistillConfig, teacher: Teacher | None, expansion: Expansion | None) -> None:
        self.chunk, self.teacher, self.expansion = settings.chunk, teacher, expansion

    def __call__(
        self, model: Transformer, rows: Targets, counts: Tensor, *, mask_documents: bool, balance_share: float
    ) -> Losses:
        depth = len(model.mtp)
        T = rows.tokens.shape[1] - 1 - depth
        batch = Batch(documents_BT=rows.documents[:, :T]) if mask_documents else None
        h_BTD, routings = model.hidden(rows.tokens[:, :T], batch)
        lm = torch.zeros((), device=model.device)
        if self.teacher is not None:
            lm = self._next_token(model, h_BTD, rows, T, mask_documents) / counts[0]
        mtp = torch.zeros_like(lm)
        if depth:
            later = [rows.tokens[:, 1 + k : 1 + k + T] for k in range(depth)]
            hs, more = model.predict_further(h_BTD, later, batch)
            routings = routings + more
            for k, draft_BTD in enumerate(hs):
                mtp = mtp + self._draft(model, h_BTD, draft_BTD, rows, k) / counts[1 + k] / depth
        return Losses(lm, mtp, balance_guard(model, routings, T, balance_share), routings)

    def _next_token(self, model: Transformer, h_BTD: Tensor, rows: Targets, T: int, masked: bool) -> Tensor:
        """Sum over the learned positions: divergence from the teacher, or from the token itself where the mask says 2."""
        assert self.teacher is not None and self.expansion is not None
        with torch.no_grad():
            # A row of lessons alone asks the teacher nothing, and would be the longest in its spelling.
            asking = (rows.mask[:, 1 : T + 1] == 1).any(1).nonzero().squeeze(1)
            asking = asking if len(asking) else torch.zeros_like(rows.tokens[:1, 0])
            tokens, documents, places = self.expansion(rows.tokens[asking, :T], rows.documents[asking, :T])
            some_h, _ = self.teacher.hidden(tokens, Batch(documents_BT=documents) if masked else None)
            some_h = some_h.gather(1, places[..., None].expand(-1, -1, some_h.shape[-1]))
            taught_h = some_h.new_zeros(len(rows.tokens), *some_h.shape[1:]).index_copy(0, asking, some_h)
        weights = rows.weights(1, T, masked).flatten()
        learned = weights.nonzero().squeeze(1)
        words = rows.tokens[:, 1 : T + 1].where(rows.mask[:, 1 : T + 1] == 2, -1).flatten()[learned]
        target = Target(taught_h.flatten(0, 1)[learned], self.teacher.head, words)
        return self._divergence(model, h_BTD.flatten(0, 1)[learned], weights[learned], target)

    def _draft(self, model: Transformer, h_BTD: Tensor, draft_BTD: Tensor, rows: Targets, k: int) -> Tensor:
        """Sum over positions: how far module k's guess at the token k + 2 places later is from the model's own."""
        T = h_BTD.shape[1] - 1 - k
        weights = rows.weights(2 + k, T, True).flatten()
        learned = weights.nonzero().squeeze(1)
        own = Target(h_BTD.detach()[:, 1 + k :].flatten(0, 1)[learned], model.head)
        draft = draft_BTD[:, :T].flatten(0, 1)[learned]
        return self._divergence(model, draft, weights[learned], own)

    def _divergence(self, model: Transformer, h_ND: Tensor, weights_N: Tensor, target: Target) -> Tensor:
        return divergence(h_ND, model.head_weight, weights_N, target, self.chunk)
