"""A training run as data: what a TOML file says, with every default visible.

`"auto"` is a value; `resolve` turns it into what this machine and this kind of run get, and the resolved configuration
is printed and saved with the run, so that it can be repeated elsewhere.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from rorqual.errors import ConfigError


@dataclass(frozen=True)
class Source:
    """path: a shard directory of `rorqual data prepare`; weight: its share of the rows (by size where none has one); or
    epochs: how often the run goes through it, whatever that share is; target: where a teacher is distilled, whether these
    tokens are learned from it or from themselves (lessons that the teacher could not have written)."""

    path: str
    weight: float | None = None
    epochs: float | None = None
    target: Literal["auto", "teacher", "data"] = "auto"

    def __post_init__(self) -> None:
        if self.epochs is not None and (self.weight is not None or self.epochs <= 0):
            raise ConfigError(f"{self.path}: give weight or epochs, not both, and more than 0 epochs")


@dataclass(frozen=True)
class DataConfig:
    """packing: "stream" concatenates documents and cuts (pretraining), "samples" keeps conversations whole (fine-tuning);
    mask_documents: whether attention stays within a document (as published: off in pretraining, on in fine-tuning);
    verify: read every shard at the start and compare checksums (about a second for each gigabyte)."""

    train: tuple[Source, ...]
    val: tuple[Source, ...] = ()
    tokenizer: str = ""
    seq_len: int = 1024
    packing: Literal["auto", "stream", "samples"] = "auto"
    mask_documents: bool | Literal["auto"] = "auto"
    verify: bool = True


@dataclass(frozen=True)
class Piece:
    """One piece of a schedule, up to `until` (a fraction of the run's tokens): "hold" is `to` throughout, "linear" and
    "cosine" go there from where the piece before ended (0 for the first), or from `start`."""

    until: float
    to: float
    shape: Literal["hold", "linear", "cosine"] = "hold"
    start: float | None = None


@dataclass(frozen=True)
class ScheduleConfig:
    """How lr, batch, gamma and the MTP weight change (`train/schedule.py`), as factors on those settings. recipe
    "simple" takes the shape from warmup_steps, decay, off_fraction, late_fraction; "deepseek-v3" is section 4.2 at
    any budget. Pieces given here stand instead of the recipe's."""

    recipe: Literal["simple", "deepseek-v3"] = "simple"
    lr: tuple[Piece, ...] = ()
    batch: tuple[Piece, ...] = ()
    gamma: tuple[Piece, ...] = ()
    mtp: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (DeepSeek-V3 section 4.2), or Muon for the matrices and AdamW for the rest. lr warms up over `warmup_steps`,
    holds, and decays over the last `decay_fraction` of the run to lr * min_lr_ratio. moments: how AdamW keeps m and v
    (as published: bfloat16; the weights themselves are fp32 always); momentum: Muon's. clip: global gradient norm.
    Weight decay acts on matrices, not on norms."""

    name: Literal["adamw", "muon"] = "adamw"
    moments: Literal["float32", "bfloat16"] = "float32"
    momentum: float = 0.95
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
class EMAConfig:
    """decay: of an average of the weights in host memory, 0 for none; every: steps between its updates (decay is raised
    to that power). It is validated beside the weights (val_loss_ema) and exported as model-ema/."""

    decay: float = 0.0
    every: int = 1


@dataclass(frozen=True)
class GuardConfig:
    """policy: what becomes of a step whose loss is not finite or stands `sigma` robust deviations above the last `window`
    ones: "skip" it, "rewind" to the newest checkpoint and take other rows (at most `rewinds` times), or "off". More than
    `in_a_row` refused steps end the run."""

    policy: Literal["off", "skip", "rewind"] = "skip"
    sigma: float = 10.0
    window: int = 64
    in_a_row: int = 20
    rewinds: int = 3


@dataclass(frozen=True)
class QuantiseConfig:
    """Training for the storage a model is shipped in: over the last `fraction` of the run's tokens the forward sees the
    weights as `rorqual convert --to` will store them; the update goes to the exact ones (straight through). to "": never."""

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
    whose weights to start from (then it is also the config). The budget is `steps` or `tokens`. batch: sequences a step
    (where it grows, at the end), in micro-batches. dtype: of the activations; precision "fp32" and "bf16" say the
    same by another name, "fp8" multiplies all linear layers in FP8 (`ops/fp8_train.py`) between activations in bf16 (or in
    fp32, where dtype says so).
    compile: the blocks, in place of our own kernels; graph: a GPU runs forward and backward as one captured CUDA graph;
    recompute: what the backward computes again for less memory: what comes before the attention ("selective"), or whole
    layers ("block"); the SwiGLU of experts is computed again in any case.
    checkpoint_every: steps; 0 for an experiment whose curves alone are wanted: no checkpoint and no model is written, also
    not where it is stopped.
    freeze: patterns of parameters that stay as they are ("layers.*", "embed_tokens.*"); one that names none is an error.
    report: write report.html when the run ends or stops; dashboard: also log to trackio's local page."""

    out: str
    data: DataConfig
    batch: int
    steps: int = 0
    tokens: int = 0
    model: str | dict[str, Any] = ""
    init_from: str = ""
    seed: int = 0
    micro_batch: int | Literal["auto"] = "auto"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    graph: bool | Literal["auto"] = "auto"
    recompute: Literal["none", "selective", "block"] = "none"
    threads: int | Literal["auto"] = "auto"
    eval_every: int = 500
    eval_rows: int = 64
    checkpoint_every: int = 1000
    checkpoint_seconds: float = 600.0
    keep_checkpoints: int = 2
    report: bool = True
    dashboard: Literal["none", "trackio"] = "none"
    export_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    optim: OptimConfig = field(default_factory=OptimConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    mtp: MTPConfig = field(default_factory=MTPConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    freeze: tuple[str, ...] = ()
    quantise: QuantiseConfig = field(default_factory=QuantiseConfig)
    distill: DistillConfig | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be right."""
        checks = {
            "give the budget as steps or as tokens, one of them and at least 1": (self.steps > 0) != (self.tokens > 0)
            and min(self.steps, self.tokens) >= 0,
            "batch must be at least 1": self.batch >= 1,
            "data.seq_len must be at least 2": self.data.seq_len >= 2,
            "data.train must name at least one source": bool(self.data.train),
            "optim.lr must be positive": self.optim.lr > 0,
            "optim.decay_fraction must lie in [0, 1]": 0 <= self.optim.decay_fraction <= 1,
            "optim.warmup_steps must not exceed the run's steps": 0
            <= self.optim.warmup_steps * (self.batch * self.data.seq_len if self.tokens else 1)
            <= (self.tokens or self.steps)
            or bool(self.schedule.lr)
            or self.schedule.recipe != "simple",
            "optim.beta2 above 0.99 needs moments = float32: in bfloat16 v could not follow such small changes": (
                self.optim.beta2 <= 0.99 or self.optim.moments == "float32"
            ),
            "optim.momentum belongs to optim.name = muon": self.optim.name == "muon"
            or self.optim.momentum == OptimConfig.momentum,
            "ema.decay must lie in [0, 1) and ema.every be at least 1": 0 <= self.ema.decay < 1 <= self.ema.every,
            "guard.sigma must be positive and guard.window at least 16": self.guard.sigma > 0
            and self.guard.window >= 16,
            f"precision = {self.precision} contradicts dtype = {self.dtype}": (self.precision, self.dtype)
            not in (("bf16", "float32"), ("fp32", "bfloat16")),
            "keep_checkpoints must be at least 1": self.keep_checkpoints >= 1,
            "checkpoint_every must not be negative": self.checkpoint_every >= 0,
            "guard.policy = rewind needs checkpoints: checkpoint_every must be at least 1": self.guard.policy
            != "rewind"
            or self.checkpoint_every >= 1,
            "quantise.fraction must lie in [0, 1]": 0 <= self.quantise.fraction <= 1,
            "distill.chunk must be at least 1": self.distill is None or self.distill.chunk >= 1,
            "model or init_from must be given": bool(self.model) or bool(self.init_from),
        }
        for message, ok in checks.items():
            if not ok:
                raise ConfigError(message)
        self._check_schedule()
        if isinstance(self.micro_batch, int) and (self.micro_batch < 1 or self.batch % self.micro_batch):
            raise ConfigError(f"micro_batch {self.micro_batch} does not divide batch {self.batch}")

    def _check_schedule(self) -> None:
        """Settings of the simple shape have no effect beside a recipe or own pieces: whoever sets them is told."""
        published = self.schedule.recipe != "simple"
        shaped = {
            "optim": (published or self.schedule.lr, ("warmup_steps", "decay", "decay_fraction", "min_lr_ratio")),
            "balance": (published or self.schedule.gamma, ("off_fraction",)),
            "mtp": (published or self.schedule.mtp, ("late_weight", "late_fraction")),
        }
        for section, (replaced, names) in shaped.items():
            mine, plain = getattr(self, section), type(getattr(self, section))()
            for name in names:
                if replaced and getattr(mine, name) != getattr(plain, name):
                    raise ConfigError(f"{section}.{name} has no effect beside [schedule]", remedy="remove one of them")


Kind = Literal["pretrain", "sft", "distill"]


def resolve(cfg: RunConfig, *, kind: Kind, cuda: bool, cores: int, replicas: int = 1) -> RunConfig:
    """Every "auto" replaced. Pure: the machine is described by the arguments (cores: what torch would take by itself, which
    honours OMP_NUM_THREADS). Raises ConfigError for a batch that the replicas cannot share evenly."""
    data = cfg.data
    if cfg.batch % replicas:
        raise ConfigError(
            f"batch {cfg.batch} cannot be shared by {replicas} replicas",
            remedy=f"set batch to a multiple of {replicas}",
        )
    share = cfg.batch // replicas
    if kind != "distill" and (cfg.distill or any(s.target != "auto" for s in data.train)):
        raise ConfigError("this run file distils", remedy="run it with `rorqual distill`, or remove distill and target")
    if data.packing == "auto":
        data = dataclasses.replace(data, packing="samples" if kind == "sft" else "stream")
    if data.mask_documents == "auto":
        data = dataclasses.replace(data, mask_documents=kind == "sft")
    device = ("cuda" if cuda else "cpu") if cfg.device == "auto" else cfg.device
    on_gpu = device.startswith("cuda")
    dtype = cfg.dtype
    if dtype == "auto":
        wide = cfg.precision == "fp32" or (cfg.precision == "auto" and not on_gpu)
        dtype = "float32" if wide else "bfloat16"
    precision = cfg.precision
    if precision == "auto":
        precision = "fp32" if dtype == "float32" else "bf16"
    micro = cfg.micro_batch
    if micro == "auto":
        # A micro-batch of about 64 K tokens fills a GPU at these sizes; on a CPU 4 K tokens stay near the caches.
        fit = max(1, (65536 if on_gpu else 4096) // data.seq_len)
        micro = max(n for n in range(1, share + 1) if share % n == 0 and n <= fit)
    elif share % micro:
        raise ConfigError(
            f"micro_batch {micro} does not divide {share}, the share of each of {replicas} replicas in batch {cfg.batch}",
            remedy=f"set micro_batch={math.gcd(share, micro)}, or batch to a multiple of {replicas * micro}",
        )
    return dataclasses.replace(
        cfg,
        data=data,
        device=device,
        micro_batch=micro,
        dtype=dtype,
        precision=precision,
        compile=False if cfg.compile == "auto" else cfg.compile,  # our kernels are as fast, and start at once
        # What fine-tuning and a teacher compute is not known to be the same kernels at every step.
        graph=on_gpu and kind == "pretrain" and cfg.compile is not True and cfg.recompute == "none"
        if cfg.graph == "auto"
        else cfg.graph,
        threads=cores if cfg.threads == "auto" else cfg.threads,
    )
