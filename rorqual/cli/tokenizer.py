"""`rorqual tokenizer train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(help="Train a tokenizer.", no_args_is_help=True)


@app.callback()
def tokenizer() -> None:
    """Train a tokenizer."""


@app.command()
def train(
    inputs: Annotated[
        list[str], typer.Argument(help="Text, JSONL, Parquet, folders of them, or addresses.", metavar="TEXT…")
    ],
    out: Annotated[Path, typer.Option(help="Directory to write tokenizer.json and tokenizer_config.json to.")],
    vocab_size: Annotated[int, typer.Option(help="Vocabulary, special tokens included.", min=300)] = 8192,
    template: Annotated[
        Literal["v3", "r1", "v3.1"], typer.Option(help="Chat template written with it; v3.1 has a thinking switch.")
    ] = "v3.1",
    max_mb: Annotated[int, typer.Option(help="Read at most this many million characters.", min=1)] = 200,
) -> None:
    """Train a byte-level BPE tokenizer with DeepSeek's pre-tokenisation and special tokens.

    Example:

        rorqual tokenizer train runs/tiny-cpu/text --vocab-size 2048 --out out/tokenizer
    """
    from rorqual.cli.progress import counter
    from rorqual.data.sources import texts
    from rorqual.data.tokenizer import train_tokenizer

    with counter("reading", "characters") as advance_to:
        made = train_tokenizer(texts(inputs, max_mb * 1_000_000), vocab_size, advance_to, template=template)
    made.save(out)
    typer.echo(f"{out}: a vocabulary of {made.vocab_size:,}")
