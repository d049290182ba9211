"""`rorqual keys create`, `list` and `revoke`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from rorqual.cli import storage

if TYPE_CHECKING:
    from rorqual.serve.keys import Key, KeyStore

app = typer.Typer(help="API keys of this machine's server.", no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def keys() -> None:
    """API keys of this machine's server: with the first one, every request needs a key."""


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What it is for, to know it again.")] = "",
    concurrency: Annotated[int | None, typer.Option(help="Requests at once.", min=1)] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Requests a minute.", min=1)] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Tokens a minute, of prompts and completions.", min=1)
    ] = None,
    as_json: AsJson = False,
    data_dir: storage.DataDir = None,
    database: storage.Database = None,
) -> None:
    """Make a key and print its secret, this once: only its hash is kept.

    A running server knows it within a second. The secret alone goes to standard output.

    Examples:

        rorqual keys create laptop

        rorqual keys create ci --concurrency 4 --requests-per-minute 60 --tokens-per-minute 100000

        export OPENAI_API_KEY=$(rorqual keys create notebook)
    """
    from rorqual.serve.keys import Limits

    limits = Limits(concurrency, requests_per_minute, tokens_per_minute)
    key, secret = _store(data_dir, database).create(name, limits)
    if as_json:
        _print_json({**_plain(key), "secret": secret})
        return
    typer.echo(f"{key.id} was made. This is its secret; it will not be shown again:", err=True)
    typer.echo(secret)


@app.command("list")
def list_(as_json: AsJson = False, data_dir: storage.DataDir = None, database: storage.Database = None) -> None:
    """List the keys, revoked ones too.

    Example:

        rorqual keys list
    """
    found = _store(data_dir, database).list()
    if as_json:
        _print_json([_plain(key) for key in found])
        return
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(
        Column("id", no_wrap=True), "name", "secret", "created", "state", "at once", "requests/min", "tokens/min"
    )
    for key in found:
        state = f"revoked {key.revoked:%Y-%m-%d %H:%M}" if key.revoked else "active"
        numbers = (key.limits.concurrency, key.limits.requests_per_minute, key.limits.tokens_per_minute)
        limits = ["–" if number is None else str(number) for number in numbers]
        table.add_row(key.id, key.name, key.hint, f"{key.created:%Y-%m-%d %H:%M}", state, *limits)
    Console().print(table)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="As `rorqual keys list` shows it.", metavar="ID")],
    data_dir: storage.DataDir = None,
    database: storage.Database = None,
) -> None:
    """Close a key for good. A running server refuses it within a second.

    Example:

        rorqual keys revoke key_0123456789abcdef
    """
    key = _store(data_dir, database).revoke(key_id)
    typer.echo(f"{key.id} {key.name} is revoked", err=True)


def _store(data_dir: Any, database: str | None) -> KeyStore:
    from rorqual.serve.keys import KeyStore

    return KeyStore(storage.database(data_dir, database))


def _plain(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "hint": key.hint,
        "created": key.created.isoformat(timespec="seconds"),
        "revoked": key.revoked and key.revoked.isoformat(timespec="seconds"),
        "concurrency": key.limits.concurrency,
        "requests_per_minute": key.limits.requests_per_minute,
        "tokens_per_minute": key.limits.tokens_per_minute,
    }


def _print_json(value: object) -> None:
    import json

    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))
