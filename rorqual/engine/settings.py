"""What an engine can be told. Torch-free: the server and the command line build it, the engine's process reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rorqual.errors import ConfigError

Auto = Literal["auto"]


@dataclass(frozen=True)
class EngineSettings:
    """model: a directory or a bundled model's name; dtype: a torch name like "bfloat16", or "auto" (as stored; fp32
    on a CPU with room for it); device: "auto" is the GPU if there is one; max_model_len: prompt and completion;
    max_num_seqs: requests computed at once; max_batched_tokens: tokens of one step ("auto": 512 on CPU, 4096 on GPU);
    cache_tokens: size of the latent cache ("auto": what the requests can use, within a quarter of the RAM or what the
    GPU has left); max_waiting: the queue's bound; threads: torch's, for the whole process ("auto": what makes a
    decoding step fastest, by timing).
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

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_batched_tokens", "cache_tokens", "max_waiting", "threads"):
            value = getattr(self, name)
            if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name} must be a positive number, not {value!r}")
