"""`rorqual chat`: a conversation in the terminal, streaming, with visible thinking."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rorqual.cli import engine as options

if TYPE_CHECKING:
    from rich.console import Console

    from rorqual.engine.api import SamplingParams
    from rorqual.engine.llm import LLM

HELP = """\
/new         forget the conversation
/think       switch DeepThink on or off
/system TEXT set the system prompt (nothing: remove it)
/retry       answer the last question again
/exit        leave (Ctrl-D does too; Ctrl-C stops an answer)"""


def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="Ask this, print the answer and leave. - reads standard input.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A model directory or bundled name.", metavar="DIR|NAME")] = None,
    think: Annotated[bool, typer.Option("--think/--no-think", help="DeepThink: let the model think first.")] = False,
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: the model's own.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus; default: the model's own.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, thinking included.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes answers repeatable.")] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    speculation: options.Speculation = -1,
    cache_dir: options.CacheDir = None,
    threads: options.Threads = 0,
) -> None:
    """Chat with a model in the terminal.

    Examples:

        rorqual chat

        rorqual chat "What is a whale?" --temperature 0

        cat notes.txt | rorqual chat - --think
    """
    from rich.console import Console

    from rorqual.config import resolve_model
    from rorqual.engine.llm import LLM
    from rorqual.errors import RequestError

    path = resolve_model(model)
    params = sampling(path, temperature, top_p, max_tokens, seed)
    console = Console(highlight=False)
    llm = LLM(
        path, device=device, dtype=dtype, threads=threads or "auto", cache_dir=cache_dir,
        speculation="auto" if speculation < 0 else speculation,
    )  # fmt: skip
    history = [{"role": "system", "content": system}] if system else []
    if prompt is not None:
        question = sys.stdin.read() if prompt == "-" else prompt
        if not question.strip():
            raise RequestError("the prompt is empty", remedy='write a question: rorqual chat "What is a whale?"')
        answer(llm, [*history, {"role": "user", "content": question}], params, think, console, quiet=True)
        return
    console.print(f"[bold]{path.resolve().name}[/bold]  [dim]/help shows the commands[/dim]")
    converse(llm, history, params, think, console)


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
        max_tokens=max_tokens,
        seed=seed,
    )


def converse(llm: LLM, history: list[dict[str, str]], params: SamplingParams, think: bool, console: Console) -> None:
    """Read, answer, repeat. An error in one turn does not end the conversation."""
    from rorqual.errors import RorqualError

    while True:
        try:
            line = console.input("[bold cyan]you[/bold cyan] › ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        command, _, rest = line.partition(" ")
        if command in ("/exit", "/quit"):
            return
        if command == "/new":
            history[:] = [m for m in history if m["role"] == "system"]
        elif command == "/think":
            think = not think and llm.template.supports_thinking
            console.print(f"[dim]DeepThink is {'on' if think else 'off'}[/dim]")
        elif command == "/system":
            history[:] = ([{"role": "system", "content": rest}] if rest else []) + [
                m for m in history if m["role"] != "system"
            ]
        elif command == "/retry":
            while history and history[-1]["role"] == "assistant":
                history.pop()
            line = history.pop()["content"] if history and history[-1]["role"] == "user" else ""
        elif command.startswith("/"):
            console.print(f"[dim]{HELP}[/dim]", markup=True)
        if not line or command in ("/new", "/think", "/system") or (command.startswith("/") and command != "/retry"):
            continue
        history.append({"role": "user", "content": line})
        try:
            text = answer(llm, history, params, think, console)
            history.append({"role": "assistant", "content": text})
        except RorqualError as error:
            history.pop()
            console.print(f"[red]{error}[/red]")


def answer(
    llm: LLM, messages: list[dict[str, str]], params: SamplingParams, think: bool, console: Console, quiet: bool = False
) -> str:
    """Stream one answer; Ctrl-C stops it and keeps what has come. Returns its text."""
    text, thinking, start, completion = "", False, time.monotonic(), None
    stream = llm.stream_chat(messages, params, thinking=think)
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
                text += delta.text
                console.print(delta.text, end="", markup=False, soft_wrap=True)
            completion = delta.completion or completion
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/dim]", end="")
    finally:
        stream.close()  # type: ignore[attr-defined]
    console.print()
    if completion is not None and not quiet:
        usage = completion.usage
        rate = usage.completion_tokens / max(time.monotonic() - start, 1e-9)
        cut = ", cut at the limit" if completion.finish_reason == "length" else ""
        cached = f", {usage.cached_tokens} prompt tokens from the cache" if usage.cached_tokens else ""
        console.print(f"[dim]{usage.completion_tokens} tokens, {rate:.0f} tokens/s{cached}{cut}[/dim]")
    return text
