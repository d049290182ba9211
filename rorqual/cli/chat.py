"""`rorqual chat`: the chat page's conversations in the terminal, or one question and its answer."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rorqual.cli import engine as options
from rorqual.cli import searching, storage

if TYPE_CHECKING:
    from rich.console import Console

    from rorqual.engine.api import SamplingParams
    from rorqual.serve.chats.shapes import ChatSettings


def chat(
    prompt: Annotated[
        str | None,
        typer.Argument(help="Ask this, print the answer and leave; nothing is kept. - reads standard input."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model directory or bundled name; repeat it to have several.", metavar="DIR|NAME"),
    ] = None,
    think: Annotated[bool, typer.Option("--think/--no-think", help="DeepThink: let the model think first.")] = False,
    look_up: Annotated[bool, typer.Option("--web/--no-web", help="Search before answering.")] = False,
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: the model's own.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus; default: the model's own.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, thinking included.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes answers repeatable.")] = None,
    open_: Annotated[
        str, typer.Option("--open", help="Go on with a conversation: its id, or 1 for the last one.", metavar="N|ID")
    ] = "",
    owner: Annotated[
        str,
        typer.Option("--key", help="Whose conversations: the id of an API key (`rorqual keys list`).", metavar="ID"),
    ] = "local",
    data_dir: storage.DataDir = None,
    database: storage.Database = None,
    search: searching.Search = "local",
    search_url: searching.SearchUrl = "",
    search_key: searching.SearchKey = "",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    speculation: options.Speculation = -1,
    cache_dir: options.CacheDir = None,
    threads: options.Threads = 0,
) -> None:
    """Chat with a model in the terminal.

    The conversations are those of the chat page of `rorqual serve` with the same data directory; both may run at once.
    /help in the conversation shows the commands.

    Examples:

        rorqual chat

        rorqual chat --open 1 --think

        rorqual chat "What is a whale?" --temperature 0

        cat notes.txt | rorqual chat - --think
    """
    from rich.console import Console

    from rorqual.config import DEFAULT_MODEL, resolve_model

    paths = [resolve_model(name) for name in model or [DEFAULT_MODEL]]
    console = Console(highlight=False)
    if prompt is not None:
        _refuse(len(paths) > 1, "one question is asked of one model", "name one --model")
        _refuse(look_up, "one question is answered without search", "leave the question out, and --web in")
        _refuse(bool(open_), "one question belongs to no conversation", "leave the question out")
        params = sampling(paths[0], temperature, top_p, max_tokens, seed)
        once(paths[0], prompt, system, params, think, console, device, dtype, speculation, cache_dir, threads)
        return
    told = options.settings(
        device=device, dtype=dtype, threads=threads, max_model_len=0, cache_tokens=0, cache_dir=cache_dir,
        cache_disk_gb=10.0, speculation=speculation, kernels="auto", deterministic=None,
    )  # fmt: skip
    values = {
        "thinking": think, "search": look_up, "system": system, "temperature": temperature, "top_p": top_p,
        "max_tokens": max_tokens, "seed": seed,
    }  # fmt: skip
    find = (search, search_url, search_key, data_dir)
    converse(paths, told, values, storage.database(data_dir, database), find, owner, open_, console)


def _refuse(bad: bool, message: str, remedy: str) -> None:
    from rorqual.errors import ConfigError

    if bad:
        raise ConfigError(message, remedy=remedy)


def sampling(
    path: Any, temperature: float | None, top_p: float | None, max_tokens: int | None, seed: int | None
) -> SamplingParams:
    """The model's generation_config.json, overridden by what was asked for. Raises RequestError."""
    from rorqual.engine.api import SamplingParams
    from rorqual.serve.served import GenerationDefaults

    own = GenerationDefaults.load(path)
    return SamplingParams(
        temperature=own.temperature if temperature is None else temperature,
        top_p=own.top_p if top_p is None else top_p,
        top_k=own.top_k,
        min_p=own.min_p,
        repetition_penalty=own.repetition_penalty,
        max_tokens=max_tokens,
        seed=seed,
    )


def converse(
    paths: list[Path], engine: dict[str, Any], values: dict[str, Any], database: str, find: Any, owner: str, open_: str,
    console: Console,
) -> None:  # fmt: skip
    """The server's inside, started for one person. Raises ConfigError, and what an engine raises that cannot start."""
    import time

    from rorqual.errors import BackendUnavailable

    try:
        from rorqual.cli.room import Room
        from rorqual.cli.serve import served_model
        from rorqual.cli.terminal import Terminal
        from rorqual.serve.app import create_app
        from rorqual.serve.callers import Caller
        from rorqual.serve.settings import Settings
    except ImportError as error:
        remedy = 'pip install "rorqual[serve,search]", or ask one question: rorqual chat "What is a whale?"'
        raise BackendUnavailable(f"conversations need {error.name}", remedy=remedy) from error
    settings = chat_settings(values)
    names = [path.resolve().name for path in paths]
    served = {name: served_model(path, name, engine) for name, path in zip(names, paths, strict=True)}
    app = create_app(served, Settings(database_url=database), None, searching.searcher(*find))
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited, and the last ones are there again
    console.print(f"[dim]loading {', '.join(names)} …[/dim]", end="\r")
    with Room(app) as room:
        console.print(f"[bold]{', '.join(names)}[/bold]  [dim]/help shows the commands[/dim]")
        terminal = Terminal(room, console, settings, owner, Caller(None, time.monotonic))
        if open_:
            terminal.open(open_)
        terminal.converse()


def chat_settings(values: dict[str, Any]) -> ChatSettings:
    """Raises RequestError for a value out of range."""
    from pydantic import ValidationError

    from rorqual.errors import RequestError
    from rorqual.serve.chats.shapes import ChatSettings

    try:
        return ChatSettings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise RequestError(f"{first['loc'][0]}: {first['msg']}", param=str(first["loc"][0])) from error


def once(
    path: Path, prompt: str, system: str, params: SamplingParams, think: bool, console: Console, device: str, dtype: str,
    speculation: int, cache_dir: str | None, threads: int,
) -> None:  # fmt: skip
    """One question, streamed; Ctrl-C stops it. Raises RequestError for an empty one."""
    from rorqual.engine.llm import LLM
    from rorqual.errors import RequestError

    llm = LLM(
        path, device=device, dtype=dtype, threads=threads or "auto", cache_dir=cache_dir,
        speculation="auto" if speculation < 0 else speculation,
    )  # fmt: skip
    question = sys.stdin.read() if prompt == "-" else prompt
    if not question.strip():
        raise RequestError("the prompt is empty", remedy='write a question: rorqual chat "What is a whale?"')
    messages = [{"role": "system", "content": system}] if system else []
    stream = llm.stream_chat([*messages, {"role": "user", "content": question}], params, thinking=think)
    thinking = False
    try:
        for delta in stream:
            if delta.reasoning:
                if not thinking:
                    console.print("[dim]thinking …[/dim]")
                thinking = True
                console.print(delta.reasoning, style="dim italic", end="", markup=False, soft_wrap=True)
            if delta.text:
                if thinking:
                    console.print("\n")
                thinking = False
                console.print(delta.text, end="", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/dim]", end="")
    finally:
        stream.close()  # type: ignore[attr-defined]
    console.print()
