"""`rorqual generate`: offline batches, lines of JSON in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rorqual.cli import engine as options

if TYPE_CHECKING:
    from rorqual.engine.api import SamplingParams
    from rorqual.engine.llm import LLM


def generate(
    inputs: Annotated[
        Path,
        typer.Argument(
            help='JSONL: {"prompt": "…"} or {"messages": […]} a line. - is standard input.', metavar="IN.jsonl"
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Write here instead of standard output.")] = None,
    model: Annotated[str | None, typer.Option(help="A model directory or bundled name.", metavar="DIR|NAME")] = None,
    think: Annotated[bool, typer.Option("--think/--no-think", help="DeepThink, for lines with messages.")] = False,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: the model's own.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus; default: the model's own.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest completion.", min=1)] = 256,
    seed: Annotated[int | None, typer.Option(help="Makes the whole batch repeatable.")] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    speculation: options.Speculation = -1,
    cache_dir: options.CacheDir = None,
    threads: options.Threads = 0,
    stats: Annotated[bool, typer.Option("--stats", help="Say at the end what the engine did.")] = False,
) -> None:
    """Complete many prompts or conversations in one go, batched by the engine.

    Each line comes back with `text`, `reasoning` (messages), `finish_reason` and `usage` added.

    Example:

        echo '{"prompt": "Once upon a time"}' | rorqual generate - --temperature 0 --max-tokens 40
    """
    from rorqual.cli.chat import sampling
    from rorqual.config import resolve_model
    from rorqual.engine.llm import LLM

    numbered = read_lines(inputs)
    lines = list(numbered.values())
    path = resolve_model(model)
    params = sampling(path, temperature, top_p, max_tokens, seed)
    llm = LLM(
        path, device=device, dtype=dtype, threads=threads or "auto", cache_dir=cache_dir,
        speculation="auto" if speculation < 0 else speculation,
    )  # fmt: skip
    for number, line in numbered.items():
        check_line(llm, line, params, think, f"{inputs}:{number}")
    results: list[Any] = [None] * len(lines)
    for kind in ("prompt", "messages"):
        where = [i for i, line in enumerate(lines) if kind in line]
        values = [lines[i][kind] for i in where]
        if not where:
            continue
        made = (
            llm.generate(values, params, progress=True)
            if kind == "prompt"
            else llm.chat(values, params, thinking=think, progress=True)
        )
        for i, completion in zip(where, made, strict=True):
            usage = {
                "prompt_tokens": completion.usage.prompt_tokens,
                "completion_tokens": completion.usage.completion_tokens,
            }
            reasoning = {"reasoning": completion.reasoning} if completion.reasoning else {}
            added = {
                "text": completion.text,
                **reasoning,
                "finish_reason": str(completion.finish_reason),
                "usage": usage,
            }
            results[i] = json.dumps({**lines[i], **added}, ensure_ascii=False)
    text = "".join(f"{line}\n" for line in results)
    out.write_text(text, encoding="utf-8") if out else typer.echo(text, nl=False)
    if stats:
        typer.echo(options.summary(llm.stats, llm.info), err=True)


def check_line(llm: LLM, line: dict[str, Any], params: SamplingParams, think: bool, where: str) -> None:
    """Before anything is computed, so that a bad last line does not cost the work of the others. Raises DataError."""
    from rorqual.engine.api import Request, check_request
    from rorqual.errors import DataError, RorqualError

    try:
        if "prompt" in line:
            ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode(line["prompt"])]
        else:
            ids = llm.template.encode(llm.tokenizer, line["messages"], thinking=think)
        check_request(Request("", tuple(ids), params), llm.info)
    except RorqualError as error:
        raise DataError(f"{where}: {error}") from None


def read_lines(inputs: Path) -> dict[int, dict[str, Any]]:
    """Line number -> content. Raises DataError naming the line that is neither a prompt nor messages."""
    import sys

    from rorqual.errors import DataError

    try:
        text = sys.stdin.read() if str(inputs) == "-" else inputs.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{inputs} cannot be read: {error}") from None
    lines = {}
    for number, row in enumerate(text.splitlines(), 1):
        if not row.strip():
            continue
        try:
            value = json.loads(row)
        except json.JSONDecodeError as error:
            raise DataError(f"{inputs}:{number}: not valid JSON: {error}", remedy="mend or remove that line") from None
        if not isinstance(value, dict) or not (
            isinstance(value.get("prompt"), str) ^ isinstance(value.get("messages"), list)
        ):
            raise DataError(f'{inputs}:{number}: expected {{"prompt": "…"}} or {{"messages": […]}}')
        if value.get("prompt") == "":
            raise DataError(f"{inputs}:{number}: the prompt is empty", remedy="write some text or remove that line")
        lines[number] = value
    if not lines:
        raise DataError(f"{inputs} has no lines")
    return lines
