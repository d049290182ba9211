"""The engine's options, the same for every command that starts one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rorqual.engine.api import EngineInfo
    from rorqual.engine.stats import EngineStats

Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[
    str,
    typer.Option(help="How weights are kept: auto (as stored), float32, bfloat16; on a CPU also int8 and int4."),
]
Threads = Annotated[int, typer.Option(help="Threads of the engine; 0 means as many as measure fastest.", min=0)]
MaxModelLen = Annotated[int, typer.Option(help="Longest prompt and answer, in tokens; 0 means the model's own.", min=0)]
CacheTokens = Annotated[int, typer.Option(help="Size of the latent cache, in tokens; 0 means what fits.", min=0)]
CacheDir = Annotated[
    str | None,
    typer.Option(help="Keep the prefix cache here too, so that it survives restarts.", metavar="DIR"),
]
CacheDiskGb = Annotated[float, typer.Option(help="At most so much of it, in GB.", min=0.001)]
Speculation = Annotated[
    int,
    typer.Option(
        help="Tokens drafted by the model's MTP module; -1 measures whether one pays, 0 is off.", min=-1, max=3
    ),
]
Kernels = Annotated[str, typer.Option(help="auto, native (compiled CPU kernels) or torch.")]
Deterministic = Annotated[
    bool | None,
    typer.Option(
        "--deterministic/--no-deterministic",
        help="The same bits in every batch; default: where the compiled CPU kernels run, which always do. On a GPU: slower.",
        show_default=False,
    ),
]


def settings(
    *,
    device: str,
    dtype: str,
    threads: int,
    max_model_len: int,
    cache_tokens: int,
    cache_dir: str | None,
    cache_disk_gb: float,
    speculation: int,
    kernels: str,
    deterministic: bool | None,
    **more: Any,
) -> dict[str, Any]:
    """`EngineSettings`' keywords from the command line's values."""
    return {
        "device": device, "dtype": dtype, "threads": threads or "auto", "max_model_len": max_model_len or "auto",
        "cache_tokens": cache_tokens or "auto", "cache_dir": cache_dir, "cache_disk_bytes": int(cache_disk_gb * 1e9),
        "speculation": "auto" if speculation < 0 else speculation, "kernels": kernels,
        "deterministic": "auto" if deterministic is None else deterministic, **more,
    }  # fmt: skip


def summary(stats: EngineStats, info: EngineInfo) -> str:
    """One line of what an engine did."""
    told = [
        f"{stats.prefill_tokens:,} prompt and {stats.new_tokens:,} new tokens in {stats.steps:,} steps, {stats.run_s:.1f} s",
        f"cache {stats.cache_hit_tokens:,} of {stats.cache_hit_tokens + stats.cache_miss_tokens:,} tokens",
    ]
    if stats.disk_hit_tokens:
        told.append(f"{stats.disk_hit_tokens:,} from disk")
    if stats.draft_tokens:
        told.append(f"{stats.acceptance:.0%} of {stats.draft_tokens:,} drafts stood")
    if share := stats.of_bound(info.bandwidth):
        told.append(f"decoding reads at {share:.0%} of {info.bandwidth / 1e9:.0f} GB/s")
    return "; ".join(told)
