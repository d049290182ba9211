"""`rorqual upcycle`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def upcycle(
    src: Annotated[Path, typer.Argument(help="A Llama-family Hugging Face directory or .gguf file.", metavar="SRC")],
    dst: Annotated[Path, typer.Argument(help="The model directory to write.", metavar="DST")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Calibration text, file or folder, repeatable. [default: Python's language reference]"),
    ] = None,
    rank: Annotated[int, typer.Option(help="kv_lora_rank; 0: a third of the hidden size.", min=0)] = 0,
    fold: Annotated[int, typer.Option(help="Neighbouring rotary speeds mixed as one.", min=1)] = 2,
    key_weight: Annotated[float, typer.Option(help="An error of keys against one of values.", min=0.01)] = 2.0,
    routed: Annotated[int, typer.Option(help="Routed experts; 0: about twelve.", min=0)] = 0,
    width: Annotated[int, typer.Option(help="Neurons an expert; 0: so that half are routed.", min=0)] = 0,
    shared: Annotated[int, typer.Option(help="Shared experts; 0: what is left.", min=0)] = 0,
    top_k: Annotated[int, typer.Option(help="Routed experts a token; 0: half of them.", min=0)] = 0,
    drop: Annotated[int, typer.Option(help="Neurons a layer with experts loses, the weakest.", min=0)] = 0,
    dense_layers: Annotated[int, typer.Option(help="First layers that stay dense.", min=0)] = 1,
    mtp: Annotated[bool, typer.Option("--mtp/--no-mtp", help="Add a multi-token-prediction module.")] = False,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="DeepSeek's chat markers and template in place of the source's.")
    ] = True,
    tokens: Annotated[
        int, typer.Option(help="Calibration tokens, a sixth of them held back to measure.", min=64)
    ] = 24576,
    length: Annotated[int, typer.Option(help="Tokens a calibration sequence.", min=8)] = 512,
    dtype: Annotated[str, typer.Option(help="Of the written weights: bfloat16, float16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of the choice of sequences and of clustering.", min=0)] = 0,
) -> None:
    """Convert a Llama-architecture model into DeepSeek-V3's architecture: MLA, shared and routed experts, MTP.

    Nothing is trained: new weights follow from the old ones and a little text. Perplexity and divergence from the
    source are printed after each step, on text that was held back; `rorqual distill` heals what was lost.

    Examples:

        rorqual upcycle smollm2.gguf out/upcycled --mtp

        rorqual upcycle Llama-dir out/v3 --text docs/ --rank 256 --top-k 8
    """
    from rorqual.checkpoint.hf import DTYPES
    from rorqual.cli.progress import counter
    from rorqual.errors import ConfigError
    from rorqual.post.upcycle import UpcycleConfig
    from rorqual.post.upcycle import upcycle as run

    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is unknown", remedy=f"choose {', '.join(DTYPES)}")
    cfg = UpcycleConfig(
        rank=rank, fold=fold, key_weight=key_weight, shared=shared, routed=routed, width=width, top_k=top_k,
        drop=drop, dense_layers=dense_layers, mtp=mtp, chat=chat, tokens=tokens, length=length, seed=seed,
    )  # fmt: skip
    with counter("converting", "layers") as advance_to:
        run(src, dst, text or [], cfg, DTYPES[dtype], say=typer.echo, progress=lambda done, _: advance_to(done))
    typer.echo(f"{dst}: written; `rorqual chat --model {dst}` talks to it, `rorqual distill` heals it")
