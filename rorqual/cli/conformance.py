"""`rorqual conformance server`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rorqual.conformance.server import Line

app = typer.Typer(help="Grade other people's servers.", no_args_is_help=True)
COLOURS = {"pass": "green", "fail": "red", "absent": "yellow"}


@app.callback()
def conformance() -> None:
    """Grade servers by what clients rely on."""


@app.command()
def server(
    base_url: Annotated[str, typer.Option(help="As a client is told it: http://host:8000/v1.", metavar="URL")],
    api_key: Annotated[
        str, typer.Option(help="Sent as a bearer token.", envvar="RORQUAL_CONFORMANCE_KEY", show_envvar=True)
    ] = "",
    model: Annotated[str, typer.Option(help="The model to ask; default: the first one listed.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds a check may take.", min=1)] = 120.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if anything failed.")] = False,
) -> None:
    """Grade any OpenAI-, DeepSeek- or Anthropic-compatible server, feature by feature.

    pass: it does what clients rely on. absent: it says that it does not have this. fail: it answers, and wrongly. No
    check depends on what the model knows; each asks for a few dozen tokens.

    Examples:

        rorqual conformance server --base-url http://127.0.0.1:8000/v1

        rorqual conformance server --base-url https://api.example.com --api-key secret --json --strict
    """
    import asyncio

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from rorqual.conformance.server import CHECKS, grade, summary

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("asking", total=len(CHECKS))

        def told(line: Line) -> None:
            progress.update(task, advance=1, description=f"{line.group}: {line.feature}")

        lines = asyncio.run(grade(base_url, api_key=api_key, model=model, timeout_s=timeout, told=told))
    counts = summary(lines)
    if as_json:
        _print_json(base_url, lines)
    else:
        _print_table(lines)
        typer.echo(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if strict and counts["fail"]:
        raise typer.Exit(1)


def _print_json(base_url: str, lines: list[Line]) -> None:
    import json
    from dataclasses import asdict

    from rorqual.conformance.server import summary

    result = {"base_url": base_url, "summary": summary(lines), "features": [asdict(line) for line in lines]}
    typer.echo(json.dumps(result, indent=1, ensure_ascii=False))


def _print_table(lines: list[Line]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from rorqual.conformance.server import by_group

    table = Table("feature", "verdict", "evidence")
    for group, found in by_group(lines):
        table.add_row(f"[bold]{group}[/bold]")
        for line in found:
            colour = COLOURS[line.verdict]
            table.add_row(f"  {line.feature}", f"[{colour}]{line.verdict}[/{colour}]", escape(line.evidence))
    Console().print(table)
