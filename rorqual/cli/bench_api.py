"""`rorqual bench http` and `rorqual bench grammar`: the cost of HTTP, and of holding to a schema."""

from __future__ import annotations

from typing import Annotated

import typer

from rorqual.cli.bench_options import Dtype, JsonFile, Rounds, Threads
from rorqual.cli.bench_report import finish
from rorqual.config import DEFAULT_MODEL


def http(
    model: Annotated[str, typer.Option(help="Whose tokenizer and template; no weights are read.")] = DEFAULT_MODEL,
    streams: Annotated[int, typer.Option(help="Streamed answers at once.", min=1)] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens of each.", min=8)] = 1000,
    rate: Annotated[float, typer.Option(help="Tokens/s of each in the steady load.", min=0.1)] = 62.5,
    rounds: Rounds = 5,
    json_file: JsonFile = None,
) -> None:
    """What HTTP costs: the server's CPU time for a streamed token, and the tokens/s that one core carries.

    The engine is scripted, so that tokens cost nothing to make. Two loads: at a steady rate, where most of the time goes
    into the kernel's sending of single events, and as fast as events can be written.

    Example:

        rorqual bench http --json benchmarks/http.json
    """
    from rorqual.cli.http_load import Load, middle
    from rorqual.config import resolve_model

    directory = resolve_model(model)
    loads = {
        f"{rate:g}/s each": Load(streams, min(tokens, round(5 * rate)), rate),
        "as fast as possible": Load(streams, tokens),
    }
    rows = [{"load": name, **middle(directory, load, rounds)} for name, load in loads.items()]
    finish("http", {"streams": streams, "rounds": rounds}, rows, "cpu", json_file)


def grammar(
    model: Annotated[str, typer.Option(help="A model directory or bundled name.")] = DEFAULT_MODEL,
    batch: Annotated[list[int] | None, typer.Option(help="Requests at once; default 1 and 8.")] = None,
    new: Annotated[int, typer.Option(help="Tokens of each.", min=8)] = 256,
    dtype: Dtype = "",
    threads: Threads = 0,
    speculation: Annotated[int, typer.Option(help="Drafts a token.", min=0)] = 0,
    rounds: Rounds = 5,
    json_file: JsonFile = None,
) -> None:
    """Decoding held to a JSON schema against decoding freely, sampled at temperature 1.

    Example:

        rorqual bench grammar --dtype bfloat16 --json benchmarks/grammar-bfloat16.json
    """
    from rorqual.cli import benchmarks as b
    from rorqual.cli import grammar_load
    from rorqual.data.tokenizer import Tokenizer

    weights = b.Weights(model)
    tokenizer = Tokenizer.load(weights.path)
    prompt = (tokenizer.bos_id, *tokenizer.encode("A list of animals as JSON:"))
    batches = batch or [1, 8]
    core = b.engine(weights, "cpu", max(batches), dtype or "float32", threads, speculation)
    rows = [grammar_load.compare(core, prompt, n, new, rounds) for n in batches]
    core.close()
    facts = {"model": model, "new": new, "dtype": dtype or "float32", "speculation": speculation, "rounds": rounds}
    finish("grammar", facts, rows, "cpu", json_file)
