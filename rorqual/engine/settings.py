"""What an engine can be told. Torch-free: the server and the command line build it, the engine's process reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rorqual.errors import ConfigError

Auto = Literal["auto"]


@dataclass(frozen=True)
class EngineSettings:
    """model: a directory or a bundled model's name; dtype: how weights are kept: a torch name like "bfloat16", on a CPU
    also int8 and int4 (quantised at load), or "auto" (as stored); device: "auto" is the GPU if there is one;
    max_model_len: prompt and completion; max_num_seqs: requests computed at once; max_batched_tokens: tokens of one
    step ("auto": 512 on CPU, 16384 on GPU, 2048 there if deterministic); cache_tokens: size of the latent cache ("auto":
    what the requests can use, within a quarter of the RAM or what the largest step leaves of a GPU, by measurement);
    max_waiting: the queue's bound; threads: of the kernels or of
    torch, for the whole process ("auto": what makes a decoding step fastest, by timing); speculation: tokens drafted by
    the model's own MTP module, 0 for none ("auto": one if the model has such a module, and only while measurement shows
    that it is faster; the tokens are the same either way); deterministic: whether a request gets the same tokens
    whatever is computed beside it, bit for bit ("auto": where the engine's own CPU kernels run, which always do; true on
    a GPU costs speed, of prompts above all);
    kernels: those, or torch ("auto": native on a CPU with a compiler); cache_dir: where pages of the prefix cache are
    also kept on disk, surviving restarts (None: nowhere), at most cache_disk_bytes of them; prompt_graphs: on a GPU, also
    capture prompts' forwards whose shape comes again (`engine.prompts`; off until it is measured on a GPU).
    """

    model: str
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | Auto = "auto"
    max_num_seqs: int = 32
    max_batched_tokens: int | Auto = "auto"
    cache_tokens: int | Auto = "auto"
    max_waiting: int = 1024
    prefix_cache: bool = True
    threads: int | Auto = "auto"
    speculation: int | Auto = "auto"
    deterministic: bool | Auto = "auto"
    kernels: Literal["auto", "native", "torch"] = "auto"
    cache_dir: str | None = None
    cache_disk_bytes: int = 10 * 2**30
    prompt_graphs: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError naming the field that is out of range."""
        counts = "max_model_len max_num_seqs max_batched_tokens cache_tokens max_waiting threads cache_disk_bytes"
        for name in counts.split():
            self._require(name, _count(getattr(self, name), 1) or getattr(self, name) == "auto", "a positive number")
        self._require("speculation", self.speculation == "auto" or _count(self.speculation, 0), '"auto", 0 or more')
        self._require("deterministic", self.deterministic in (True, False, "auto"), 'true, false or "auto"')
        self._require("kernels", self.kernels in ("auto", "native", "torch"), '"auto", "native" or "torch"')
        if self.cache_dir is not None and not self.prefix_cache:
            raise ConfigError("cache_dir keeps pages of the prefix cache, which is off", remedy="leave one of them out")

    def _require(self, name: str, ok: bool, rule: str) -> None:
        if not ok:
            raise ConfigError(f"{name} must be {rule}, not {getattr(self, name)!r}")


def _count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
