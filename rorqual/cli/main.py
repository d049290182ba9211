"""The command line: one file a command, heavy imports inside the command, errors as one line and a remedy."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from rorqual.cli import (
    bench,
    chat,
    conformance,
    convert,
    data,
    distill,
    generate,
    handoff,
    index,
    inspect,
    keys,
    lint,
    serve,
    sft,
    tokenizer,
    train,
    upcycle,
    verify,
)
from rorqual.errors import RorqualError

app = typer.Typer(
    name="rorqual",
    help="The whole DeepSeek-V3 system: train, inspect, chat with and serve models of that architecture.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("serve")(serve.serve)
app.command("chat")(chat.chat)
app.command("generate")(generate.generate)
app.command("inspect")(inspect.inspect)
app.command("convert")(convert.convert)
app.command("lint")(lint.lint)
app.command("verify")(verify.verify)
app.command("handoff")(handoff.handoff)
app.command("train")(train.train)
app.command("sft")(sft.sft)
app.command("distill")(distill.distill)
app.command("upcycle")(upcycle.upcycle)
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(data.app, name="data")
app.add_typer(index.app, name="index")
app.add_typer(keys.app, name="keys")
app.add_typer(conformance.app, name="conformance")
app.add_typer(bench.app, name="bench")


def print_version(asked: bool) -> None:
    """Eager: it answers before a command is looked for."""
    if asked:
        from rorqual import __version__

        typer.echo(f"rorqual {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=print_version)
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what is logged on the way.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options that stand before the command."""
    logging.basicConfig(level=logging.INFO if verbose or debug else logging.WARNING, format="%(message)s")


def main(argv: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 an error with its remedy on standard error, 2 wrong usage, 130 interrupted."""
    args = sys.argv[1:] if argv is None else argv
    debug = "--debug" in args
    # `rorqual train run.toml --debug` reads as naturally as `rorqual --debug train run.toml`.
    args = (["--debug"] if debug else []) + [a for a in args if a != "--debug"]
    try:
        app(args)
    except RorqualError as error:
        if debug:
            raise
        typer.secho(f"rorqual: {error}", fg="red", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
