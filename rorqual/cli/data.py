"""`rorqual data prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Turn corpora into token shards.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Turn corpora into token shards."""


@app.command()
def prepare(
    inputs: Annotated[
        list[Path], typer.Argument(help="Text (.txt .md .rst), JSONL or folders, also .xz and .gz.", metavar="TEXT…")
    ],
    tokenizer: Annotated[Path, typer.Option(help="Directory with tokenizer.json: the model's own.")],
    out: Annotated[Path, typer.Option(help="Directory for the shards (train/, and val/ where asked for).")],
    val_fraction: Annotated[float, typer.Option(help="Share of documents kept for validation.", min=0, max=0.5)] = 0.0,
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
    """
    from rorqual.cli.progress import counter
    from rorqual.data import prepare as room

    with counter("tokenising", "tokens") as advance_to:
        report = room.prepare(
            inputs,
            out,
            tokenizer,
            val_fraction=val_fraction,
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
