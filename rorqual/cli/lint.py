"""`rorqual lint`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rorqual.checkpoint.lint import Report

COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}


def lint(
    model: Annotated[str, typer.Argument(help="A model directory, or a bundled model.", metavar="DIR")],
    fix: Annotated[
        bool, typer.Option("--fix", help="Write the mended configuration to config.fixed.json beside config.json.")
    ] = False,
    fix_to: Annotated[
        Path | None,
        typer.Option(help="Write the mended configuration to this file, which must not exist.", metavar="FILE"),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="Show and count what affects this engine only.", metavar="NAME"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a checkpoint: what is wrong with it, for which engines, and what to do about it.

    Reads config.json, the index, the headers of all shards, the tokenizer's files, and the scales of quantised weights;
    hundreds of gigabytes take seconds. Engines: transformers, vLLM, SGLang, llama.cpp, rorqual. Ends with status 1
    if there is an error. Nothing is overwritten: move config.fixed.json over config.json once you have read it.

    Examples:

        rorqual lint rorqual-mini

        rorqual lint /models/my-v3 --engine vllm

        rorqual lint /models/my-v3 --fix

        rorqual lint /models/my-v3 --json
    """
    from rorqual.checkpoint import lint as linter
    from rorqual.config import resolve_model

    engine = _engine(engine)
    directory = Path(model) if Path(model).is_dir() else resolve_model(model)
    report = _read(directory)
    facts: dict[str, Any] = {}
    target = fix_to or (directory / linter.FIXED if fix else None)
    if target is not None:
        facts = _fix(report, target, given=fix_to is not None)
    shown = report.for_engine(engine)
    if as_json:
        typer.echo(json.dumps({**shown.to_json(), **({"engine": engine} if engine else {}), **facts}, indent=2))
    else:
        _print(shown, facts)
    raise typer.Exit(1 if shown.count("error") else 0)


def _engine(name: str | None) -> str | None:
    """The engine's name as we spell it. Raises ConfigError."""
    from rorqual.checkpoint.lint import ENGINES
    from rorqual.errors import ConfigError

    known = {e.lower().replace(".", ""): e for e in ENGINES}
    if name is not None and name.lower().replace(".", "") not in known:
        raise ConfigError(f"no engine is called {name!r}", remedy=f"engines: {', '.join(ENGINES)}")
    return known[name.lower().replace(".", "")] if name is not None else None


def _read(directory: Path) -> Report:
    from rorqual.checkpoint.lint import lint as read
    from rorqual.cli.progress import counter

    with counter("reading headers", "shards") as progress:
        return read(directory, progress)


def _fix(report: Report, target: Path, given: bool) -> dict[str, Any]:
    """Write what can be mended. Raises CheckpointError rather than overwrite a file that was named."""
    from rorqual.checkpoint.lint import fix, write_config
    from rorqual.errors import CheckpointError

    if given and target.exists():
        raise CheckpointError(f"{target} exists", remedy="name a new file, or remove it")
    config, mended, left = fix(report)
    if mended:
        write_config(config, target)
    return {"fix": {"written": str(target) if mended else None, "mended": mended, "left": left.ids}}


def _print(report: Report, facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    for finding in report.findings:
        head = Text.assemble((finding.severity, f"bold {COLOURS[finding.severity]}"), "  ", (finding.id, "bold"))
        console.print(head.append(f"  ({', '.join(finding.engines)})", "dim"))
        for line in (finding.wrong, f"here: {finding.found}", f"fix: {finding.fix}"):
            console.print(Padding(Text(line), (0, 0, 0, 4), expand=False))
    if (fix := facts.get("fix")) and fix["mended"]:
        console.print(Text(f"mended in {fix['written']}: {', '.join(fix['mended'])}"), soft_wrap=True)
    elif fix:
        console.print("nothing that a change of config.json could mend")
    subject = report.subject
    counts = ", ".join(_plural(report.count(name), name) for name in COLOURS)
    read = f"{_plural(len(subject.entries), 'tensor')} in {_plural(len(subject.files), 'shard')}"
    console.print(Text(f"{subject.directory}: {counts} ({read})"), soft_wrap=True)


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"
