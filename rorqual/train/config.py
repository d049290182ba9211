"""A training run as data: what a TOML file says, with every default visible.

`"auto"` is a value; `resolve` turns it into what this machine and this kind of run get, and the resolved configuration
is printed and saved with the run, so that it can be repeated elsewhere.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from rorqual.errors import ConfigError


@dataclass(frozen=True)
class Source:
    """path: a shard directory of `rorqual data prepare`; weight: its share of the rows (by size where none has one);
    target: where a teacher is distilled, whether these tokens are learned from it or from themselves (lessons that the
    teacher could not have written)."""

    path: str
    weight: float | None = None
    target: Literal["auto", "teacher", "data"] = "auto"


@dataclass(frozen=True)
class DataConfig:
    """packing: "stream" concatenates documents and cuts (pretraining), "samples" keeps conversations whole (fine-tuning);
    mask_documents: whether attention stays within a document (as published: off in pretraining, on in fine-tuning)."""

    train: tuple[Source, ...]
    val: tuple[Source, ...] = ()
    tokenizer: str = ""
    seq_len: int = 1024
    packing: Literal["auto", "stream", "samples"] = "auto"
    mask_documents: bool | Literal["auto"] = "auto"


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (DeepSeek-V3 section 4.2), or muon: torch.optim.Muon for the matrices of attention and of dense and shared
    feed-forwards, with updates of AdamW's size, so that one lr serves; AdamW for everything else. lr warms up over
    `warmup_steps`, holds, and decays over the last `decay_fraction` of the run to lr * min_lr_ratio. clip: global gradient
    norm. Decay acts on matrices, not on norms."""

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int = 100
    decay: Literal["cosine", "linear"] = "cosine"
    decay_fraction: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


@dataclass(frozen=True)
class BalanceConfig:
    """gamma: the step of the bias update, zero over the last `off_fraction` of the run (the paper: 0.5T of 14.8T tokens);
    alpha: factor of the sequence-wise loss."""

    gamma: float = 1e-3
    off_fraction: float = 0.034
    alpha: float = 1e-4


@dataclass(frozen=True)
class MTPConfig:
    """weight: of the further predictions' loss, `late_weight` over the last `late_fraction` (the paper: 0.3, then 0.1 for
    4.8T of 14.8T tokens)."""

    weight: float = 0.3
    late_weight: float = 0.1
    late_fraction: float = 0.324


@dataclass(frozen=True)
class QuantiseConfig:
    """Training for the storage a model is shipped in: over the last `fraction` of the run the forward sees the weights as
    `rorqual convert --to` will store them, and the update goes to the exact ones (straight through). to "": off."""

    to: Literal["", "int4", "int8", "fp8"] = ""
    fraction: float = 0.25
    embeddings: bool = True


@dataclass(frozen=True)
class DistillConfig:
    """teacher: a Llama-family directory or .gguf file, or a model directory of this package; may be left out where only
    MTP modules are trained, for they learn from the model itself. expand: a special token of the student's -> the text
    the teacher reads in its place, special tokens of its own included. chunk: positions whose logits exist at once."""

    teacher: str = ""
    expand: dict[str, str] = field(default_factory=dict)
    chunk: int = 4096
    teacher_dtype: Literal["auto", "float32", "bfloat16"] = "auto"


@dataclass(frozen=True)
class RunConfig:
    """One run. `model` is a preset, a directory (its config), or a table of released keys; `init_from` a model directory
    whose weights to start from (then it is also the config). batch: sequences a step, in micro-batches. freeze: patterns
    of parameters that stay as they are ("layers.*", "embed_tokens.*")."""

    out: str
    data: DataConfig
    steps: int
    batch: int
    model: str | dict[str, Any] = ""
    init_from: str = ""
    seed: int = 0
    micro_batch: int | Literal["auto"] = "auto"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    threads: int | Literal["auto"] = "auto"
    eval_every: int = 500
    eval_rows: int = 64
    checkpoint_every: int = 1000
    checkpoint_seconds: float = 600.0
    keep_checkpoints: int = 2
    export_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    optim: OptimConfig = field(default_factory=OptimConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    mtp: MTPConfig = field(default_factory=MTPConfig)
    freeze: tuple[str, ...] = ()
    quantise: QuantiseConfig = field(default_factory=QuantiseConfig)
    distill: DistillConfig | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be right."""
        checks = {
            "steps must be at least 1": self.steps >= 1,
            "batch must be at least 1": self.batch >= 1,
            "data.seq_len must be at least 2": self.data.seq_len >= 2,
            "data.train must name at least one source": bool(self.data.train),
            "optim.lr must be positive": self.optim.lr > 0,
            "optim.decay_fraction must lie in [0, 1]": 0 <= self.optim.decay_fraction <= 1,
            "optim.warmup_steps must not exceed steps": 0 <= self.optim.warmup_steps <= self.steps,
            "keep_checkpoints must be at least 1": self.keep_checkpoints >= 1,
            "checkpoint_every must be at least 1": self.checkpoint_every >= 1,
            "quantise.fraction must lie in [0, 1]": 0 <= self.quantise.fraction <= 1,
            "distill.chunk must be at least 1": self.distill is None or self.distill.chunk >= 1,
            "model or init_from must be given": bool(self.model) or bool(self.init_from),
        }
        for message, ok in checks.items():
            if not ok:
                raise ConfigError(message)
        if isinstance(self.micro_batch, int) and (self.micro_batch < 1 or self.batch % self.micro_batch):
            raise ConfigError(f"micro_batch {self.micro_batch} does not divide batch {self.batch}")


Kind = Literal["pretrain", "sft", "distill"]


def resolve(cfg: RunConfig, *, kind: Kind, cuda: bool, cores: int) -> RunConfig:
    """Every "auto" replaced. Pure: the machine is described by the arguments (cores: what torch would take by itself, which
    honours OMP_NUM_THREADS)."""
    data = cfg.data
    if kind != "distill" and (cfg.distill or any(s.target != "auto" for s in data.train)):
        raise ConfigError("this run file distils", remedy="run it with `rorqual distill`, or remove distill and target")
    if data.packing == "auto":
        data = dataclasses.replace(data, packing="samples" if kind == "sft" else "stream")
    if data.mask_documents == "auto":
        data = dataclasses.replace(data, mask_documents=kind == "sft")
    device = ("cuda" if cuda else "cpu") if cfg.device == "auto" else cfg.device
    on_gpu = device.startswith("cuda")
    micro = cfg.micro_batch
    if micro == "auto":
        # A micro-batch of about 64 K tokens fills a GPU at these sizes; on a CPU 4 K tokens stay near the caches.
        fit = max(1, (65536 if on_gpu else 4096) // data.seq_len)
        micro = max(n for n in range(1, cfg.batch + 1) if cfg.batch % n == 0 and n <= fit)
    return dataclasses.replace(
        cfg,
        data=data,
        device=device,
        micro_batch=micro,
        dtype=("bfloat16" if on_gpu else "float32") if cfg.dtype == "auto" else cfg.dtype,
        compile=on_gpu if cfg.compile == "auto" else cfg.compile,
        threads=cores if cfg.threads == "auto" else cfg.threads,
    )
