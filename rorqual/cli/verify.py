"""`rorqual verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rorqual.checkpoint.verify import Peer, Report
    from rorqual.checkpoint.verify_prompts import Prompt, Words


def verify(
    model: Annotated[str, typer.Argument(help="A model directory or bundled name.", metavar="DIR|NAME")],
    against: Annotated[
        str, typer.Option(help="The other engine, or the address of a server.", metavar="transformers|llama.cpp|URL")
    ],
    peer_dir: Annotated[
        Path | None, typer.Option(help="What a local peer loads, if not the same directory.", metavar="DIR")
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option(help="For llama.cpp; default: an fp32 file, written and removed.", metavar="FILE")
    ] = None,
    peer_python: Annotated[
        Path | None, typer.Option(help="A Python that has llama-cpp-python, if not this one.", metavar="PATH")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Paragraphs of this file instead of the built-in texts.", metavar="FILE")
    ] = None,
    prompts: Annotated[int | None, typer.Option(help="Use the first so many.", min=1)] = None,
    max_tokens_per_prompt: Annotated[int, typer.Option(help="Cut longer ones.", min=2)] = 256,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Largest difference of a log-probability; the mean may reach a twentieth of it. "
            "Default: 1e-3 for transformers, 5e-3 for llama.cpp, 2 for a server (bf16).",
            min=0,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of our side: float32, bfloat16 or auto.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda, for our side and transformers.")] = "cpu",
    api_key: Annotated[str | None, typer.Option(help="For a server that wants one.")] = None,
    model_name: Annotated[
        str | None, typer.Option("--model", help="The server's name of the model; default: the first it lists.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer of the peer.", min=0.1)] = 300,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write rows and environment as JSON.", metavar="FILE")
    ] = None,
) -> None:
    """Compare what rorqual computes with what another engine computes, token by token.

    The same prompts go through both, as token ids; compared are the log-probabilities of the prompts' own tokens, which
    token is ranked first, and, where the peer shows them, all logits. Exit status 0 if they agree within the threshold,
    1 if not.

    Quantised weights are read for transformers and llama.cpp by a second, independent reader. A server must offer
    prompt_logprobs (vLLM), /generate (SGLang) or echo; otherwise its greedy continuations are compared.

    Examples:

        rorqual verify rorqual-mini --against transformers

        rorqual verify out/int4 --against llama.cpp --peer-python ~/llama/bin/python

        rorqual verify DeepSeek-V3 --against http://127.0.0.1:8000/v1 --device cuda --dtype auto --json verify.json
    """
    from rorqual.checkpoint.verify import Ours
    from rorqual.checkpoint.verify import verify as run
    from rorqual.checkpoint.verify_prompts import Words, make_prompts
    from rorqual.cli.progress import counter
    from rorqual.config import ModelConfig, resolve_model
    from rorqual.engine.load import pick_device
    from rorqual.errors import ConfigError

    kind = "server" if "://" in against else against
    if kind not in ("transformers", "llama.cpp", "server"):
        raise ConfigError(f"--against {against!r} is unknown", remedy="choose transformers, llama.cpp or an address")
    if dtype not in ("float32", "bfloat16", "auto"):
        raise ConfigError(f"--dtype {dtype!r} is unknown", remedy="choose float32, bfloat16 or auto")
    path, place = resolve_model(model), str(pick_device(device))
    words = Words.load(path)
    asked = make_prompts(ModelConfig.load(path), words, text, prompts, max_tokens_per_prompt)
    options = {"gguf": gguf, "python": peer_python, "key": api_key, "name": model_name, "timeout": timeout}
    peer = _peer(kind, against, peer_dir or path, place, asked, words, options)
    try:
        ours = Ours(path, dtype, place)
        with counter(f"comparing with {kind}", f"of {len(asked)} prompts") as progress:
            report = run(ours, peer, asked, words, model=str(model), threshold=threshold, progress=progress)
    finally:
        peer.close()
    _print(report)
    if json_file is not None:
        _write(report, json_file, place, {"dtype": dtype, "device": place})
    if not report.passed:
        raise typer.Exit(1)


def _peer(
    kind: str, against: str, path: Path, device: str, prompts: list[Prompt], words: Words, options: dict[str, Any]
) -> Peer:
    if kind == "server":
        from rorqual.checkpoint.verify_server import ServerPeer

        key, name = options["key"], options["name"]
        return ServerPeer(against, words, api_key=key, model=name, timeout_s=options["timeout"])
    from rorqual.checkpoint.verify_peers import LlamaCppPeer, TransformersPeer

    if kind == "transformers":
        return TransformersPeer(path, device)
    longest = max(len(prompt.ids) for prompt in prompts)
    return LlamaCppPeer(path, options["gguf"], longest, options["python"], options["timeout"])


def _write(report: Report, file: Path, device: str, facts: dict[str, Any]) -> None:
    from rorqual.cli.bench_report import environment
    from rorqual.errors import ConfigError

    found = report.to_json()
    result = {**found, "kind": "verify", "peer_kind": found["kind"], **facts, "environment": environment(device)}
    try:
        file.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}", remedy="choose another --json file") from None


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    columns = {
        "prompt": "prompt", "tokens": "tokens", "max_abs": "max |d|", "mean_abs": "mean |d|",
        "argmax_agreement": "same first", "ties": "ties", "disagreements": "others", "logits_relative": "logits",
        "perplexity_ours": "ppl ours", "perplexity_peer": "ppl peer",
    }  # fmt: skip
    table = Table(title=f"{report.model} and {report.peer}", title_justify="left")
    for heading in columns.values():
        table.add_column(heading, justify="left" if heading == "prompt" else "right")
    for row in report.rows:
        table.add_row(*(_cell(key, row[key]) for key in columns))
    table.add_section()
    table.add_row(*(_cell(key, report.total[key]) for key in columns))
    console.print(table)
    for line in _lines(report):
        console.print(line, markup=False, soft_wrap=True)


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key == "argmax_agreement":
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:.4g}" if key.startswith("perplexity") else f"{value:.1e}"
    return str(value)


def _lines(report: Report) -> list[str]:
    lines = [
        "d: difference of the log-probability of a token; ties: another token first, but ours were nearer than twice the "
        "largest difference; logits: relative error of all of them"
    ]
    if (widest := report.total["max_abs_any_token"]) is not None:
        lines.append(f"largest difference over the whole vocabulary: {widest:.2e}")
    equal, different = report.tokenisation["equal"], report.tokenisation["different"]
    if equal + different:
        lines.append(f"the peer's tokenizer gives the same ids for {equal} of {equal + different} texts")
    lines += [f"note: {note}" for note in report.notes]
    if report.passed:
        return [*lines, f"equal within {report.threshold:g} (mean within {report.mean_threshold:g})"]
    return [*lines, f"NOT equal: {'; '.join(report.faults)}"]
