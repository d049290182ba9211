"""`rorqual data prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Inputs = Annotated[
    list[str],
    typer.Argument(
        help="Text (.txt .md .rst), JSONL, Parquet or folders, also .xz and .gz; addresses (s3://…, hf://…); data sets "
        "(datasets:NAME@SPLIT).",
        metavar="TEXT…",
    ),
]

app = typer.Typer(help="Turn corpora into token shards.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Turn corpora into token shards."""


@app.command()
def clean(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="JSONL file for what is kept, .xz and .gz packed.")],
    near: Annotated[
        float,
        typer.Option(
            help="Jaccard similarity of word 5-grams from which a text is a copy; 0 keeps copies.", min=0, max=1
        ),
    ] = 0.8,
    against: Annotated[
        list[str] | None, typer.Option(help="Evaluation sets: what shares 13 words in a row with one is left out.")
    ] = None,
) -> None:
    """Leave out near-duplicates, and what evaluation sets contain.

    What was left out, why, and of what it is a copy stands in a second file beside the first (….removed.jsonl).

    Example:

        rorqual data clean books.jsonl.xz web/ --against evals/gsm8k.jsonl --out out/clean.jsonl.xz
    """
    from rorqual.cli.progress import counter
    from rorqual.data import clean as room

    with counter("reading", "documents") as advance_to:
        report = room.clean(inputs, out, near=near, against=against or [], progress=advance_to)
    typer.echo(
        f"{out}: {report.kept:,} documents kept, {report.near:,} near-duplicates and {report.contaminated:,} that "
        f"evaluation sets contain left out, {report.skipped:,} empty or unreadable"
    )


@app.command()
def prepare(
    inputs: Inputs,
    tokenizer: Annotated[Path, typer.Option(help="Directory with tokenizer.json: the model's own.")],
    out: Annotated[Path, typer.Option(help="Directory for the shards (train/, and val/ where asked for).")],
    val_fraction: Annotated[float, typer.Option(help="Share of documents kept for validation.", min=0, max=0.5)] = 0.0,
    fim: Annotated[
        float, typer.Option(help="Share of texts written for fill-in-the-middle; DeepSeek-V3: 0.1.", min=0, max=1)
    ] = 0.0,
    split_newlines: Annotated[
        float, typer.Option(help="Share of punctuation-and-newline tokens learned as two.", min=0, max=1)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of what these two draw.")] = 0,
    skip_bad: Annotated[
        bool, typer.Option(help="Count lines that are not valid JSON instead of stopping there.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace shards of other inputs that are already there.")] = False,
) -> None:
    """Tokenise texts and conversations into memory-mapped shards for `train` and `sft`.

    JSONL lines are {"text": …} or {"messages": [{"role", "content", "reasoning_content"?}, …]}; of a conversation only
    the assistant's words are marked to be learned. Interrupted, it goes on where it stopped.

    Examples:

        rorqual data prepare docs/ books.jsonl.xz --tokenizer out/tokenizer --out out/shards --val-fraction 0.01

        rorqual data prepare dialogues.jsonl --tokenizer out/tokenizer --out out/chat

        rorqual data prepare 's3://bucket/code/*.parquet' --tokenizer out/tokenizer --out out/code --fim 0.1
    """
    from rorqual.cli.progress import counter
    from rorqual.data import prepare as room

    with counter("tokenising", "tokens") as advance_to:
        report = room.prepare(
            inputs,
            out,
            tokenizer,
            val_fraction=val_fraction,
            fim=fim,
            split_newlines=split_newlines,
            seed=seed,
            skip_bad=skip_bad,
            overwrite=overwrite,
            progress=lambda so_far, _: advance_to(so_far.tokens),
        )
    skipped = {"empty": report.empty, "undecodable": report.undecodable, "bad": report.bad}
    notes = "".join(f", {n:,} {kind} left out" for kind, n in skipped.items() if n)
    typer.echo(
        f"{out}: {report.documents:,} documents ({report.conversations:,} conversations), {report.tokens:,} tokens, "
        f"{report.val_tokens:,} of them for validation{notes}"
    )
