"""`rorqual convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    src: Annotated[
        str, typer.Argument(help="A model directory (released or demo naming) or bundled name.", metavar="SRC")
    ],
    dst: Annotated[Path, typer.Argument(help="The directory, or the .gguf file, to write.", metavar="DST")],
    to: Annotated[str, typer.Option(help="bf16, fp16, fp32, fp8, int8, int4 or gguf.")] = "bf16",
    gguf_type: Annotated[str, typer.Option(help="For gguf: f32, f16, bf16, q8_0, q4_0, q4_1, q5_0 or q5_1.")] = "bf16",
    scale_fmt: Annotated[
        str | None, typer.Option(help="For fp8: ue8m0 makes scales powers of two, as DeepSeek-V3.1 has them.")
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings/--no-embeddings", help="For int8 and int4: quantise embedding and head too.")
    ] = True,
    untie: Annotated[bool, typer.Option("--untie", help="Store a tied embedding a second time, as the head.")] = False,
    text: Annotated[
        Path | None, typer.Option(help="Print perplexity on this text before and after.", metavar="FILE")
    ] = None,
    max_shard_gb: Annotated[float, typer.Option(help="Largest shard, in GB.", min=0.001)] = 5.0,
) -> None:
    """Write a checkpoint in another storage: FP8 blocks, four or eight bits, plain numbers, or a GGUF file.

    Works as a stream: memory holds one tensor and two shards of the source, whatever the model's size. A conversion that
    was interrupted, even by kill -9, goes on when the same command is given again. The result carries SHA256SUMS.

    int8 and int4 are compressed-tensors' pack-quantized (symmetric, groups of 32). Some engines read no quantised
    embedding: --no-embeddings leaves embedding and head plain for them. vLLM and SGLang tie none of this architecture:
    --untie writes the head for them. llama.cpp aborts with some of these models on CPUs that have AMX (its issue 19184):
    run it with --no-repack there.

    Examples:

        rorqual convert DeepSeek-V3 DeepSeek-V3-bf16 --to bf16

        rorqual convert rorqual-mini out/bf16 --to bf16 --text README.md

        rorqual convert rorqual-mini out/model.gguf --to gguf --gguf-type q8_0
    """
    from rorqual.checkpoint.convert import TARGETS
    from rorqual.checkpoint.convert import convert as run
    from rorqual.checkpoint.source import Source
    from rorqual.cli.progress import byte_bar
    from rorqual.config import resolve_model
    from rorqual.errors import CheckpointError, ConfigError

    path = resolve_model(src)
    if to not in (*TARGETS, "gguf"):
        raise ConfigError(f"--to {to!r} is unknown", remedy=f"choose {', '.join(TARGETS)} or gguf")
    before = perplexity(path, text) if text else None
    if to == "gguf":
        from rorqual.checkpoint.gguf import export_gguf

        if text:
            raise ConfigError("--text needs a result that rorqual runs", remedy="leave it out for gguf")
        if dst.exists():
            raise CheckpointError(f"{dst} exists", remedy="choose another name or remove it")
        with byte_bar(f"writing {dst}") as progress:
            warnings = export_gguf(Source.open(path), dst, kind=gguf_type, progress=progress)
        for warning in warnings:
            typer.secho(f"warning: {warning}", fg="yellow", err=True)
        typer.echo(f"{dst}: {dst.stat().st_size:,} bytes")
        return
    with byte_bar(f"writing {dst}") as progress:
        done = run(
            path, dst, to, scale_fmt=scale_fmt, embeddings=embeddings, untie=untie,
            max_shard_bytes=int(max_shard_gb * 1e9), progress=progress,
        )  # fmt: skip
    if done.kept_plain:
        typer.secho(
            f"warning: {len(done.kept_plain)} matrices stay bf16, their width is no multiple of 32: {done.kept_plain[0]} …",
            fg="yellow",
            err=True,
        )
    typer.echo(f"{dst}: {done.total_bytes:,} bytes in {len(done.files)} file{'s' if len(done.files) > 1 else ''}")
    if text and before is not None:
        after = perplexity(dst, text)
        typer.echo(f"perplexity on {text}: {before:.4f} before, {after:.4f} after ({after / before - 1:+.2%})")


def perplexity(directory: Path, text: Path, window: int = 1024) -> float:
    """exp of the mean negative log-likelihood of a text's tokens, in windows that each start afresh, bf16 or fp32 as
    stored computed in fp32. Raises DataError for a text that cannot be read or is too short."""
    import math

    import torch
    import torch.nn.functional as F

    from rorqual.checkpoint import load_model
    from rorqual.data.tokenizer import Tokenizer
    from rorqual.errors import DataError

    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{text} cannot be read: {error}") from None
    tokenizer = Tokenizer.load(directory)
    model = load_model(directory, dtype=torch.float32)
    ids = tokenizer.encode(content)
    if len(ids) < 2:
        raise DataError(f"{text} has fewer than two tokens", remedy="give a longer text")
    window = min(window, model.cfg.max_position_embeddings - 1)
    loss = 0.0
    with torch.inference_mode():
        for start in range(0, len(ids), window):
            row = torch.tensor([[tokenizer.bos_id, *ids[start : start + window]]])
            logits = model(row[:, :-1])[0].float()
            loss += F.cross_entropy(logits, row[0, 1:], reduction="sum").item()
    return math.exp(loss / len(ids))
