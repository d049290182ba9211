"""`rorqual bench`: measurements as commands. One table, one JSON file, hardware, versions and commit named in both."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from rorqual.cli.bench_api import grammar, http
from rorqual.cli.bench_engine import profile, soak
from rorqual.cli.bench_options import (
    AlsoDeterministic,
    AlsoOverlapping,
    AlsoPromptGraphs,
    Device,
    Dtype,
    JsonFile,
    Llama,
    Model,
    Peer,
    Rounds,
    Threads,
)
from rorqual.cli.bench_report import environment, finish, interleaved, print_rows, report
from rorqual.cli.bench_train import train
from rorqual.config import DEFAULT_MODEL

app = typer.Typer(help="Measure speed; every figure beside its peer and its physical bound.", no_args_is_help=True)
app.command()(profile)
app.command()(soak)
app.command()(http)
app.command()(grammar)


@app.callback()
def bench() -> None:
    """Measure speed; every figure beside its peer and its physical bound."""


app.command()(train)


@app.command()
def decode(
    model: Model = "bench-cpu",
    device: Device = "cpu",
    batch: Annotated[int, typer.Option(help="Sequences side by side.")] = 1,
    prompt: Annotated[int, typer.Option(help="Prompt tokens of each.")] = 512,
    new: Annotated[int, typer.Option(help="Tokens to generate for each.")] = 64,
    dtype: Dtype = "",
    deterministic: AlsoDeterministic = False,
    overlap: AlsoOverlapping = False,
    threads: Threads = 0,
    rounds: Rounds = 5,
    peer: Peer = True,
    llama: Llama = True,
    json_file: JsonFile = None,
) -> None:
    """Greedy decoding through the engine: tokens a second after the prompt.

    Example:

        rorqual bench decode --model bench-cpu --prompt 512 --batch 8 --dtype int8
    """
    more = deterministic, overlap, False
    _generate("decode", model, device, (batch, prompt, new), dtype, more, threads, rounds, peer, llama, json_file)


@app.command()
def prefill(
    model: Model = "bench-cpu",
    device: Device = "cpu",
    batch: Annotated[int, typer.Option(help="Prompts.")] = 1,
    prompt: Annotated[int, typer.Option(help="Tokens of each.")] = 512,
    dtype: Dtype = "",
    deterministic: AlsoDeterministic = False,
    overlap: AlsoOverlapping = False,
    prompt_graphs: AlsoPromptGraphs = False,
    threads: Threads = 0,
    rounds: Rounds = 5,
    peer: Peer = True,
    llama: Llama = True,
    json_file: JsonFile = None,
) -> None:
    """Reading prompts: prompt tokens a second until the first token is there.

    Example:

        rorqual bench prefill --model bench-cpu --prompt 512
    """
    more = deterministic, overlap, prompt_graphs
    _generate("prefill", model, device, (batch, prompt, 1), dtype, more, threads, rounds, peer, llama, json_file)


def _generate(
    kind: str,
    model: str,
    device: str,
    shape: tuple[int, int, int],
    dtype: str,
    more: tuple[bool, bool, bool],
    threads: int,
    rounds: int,
    peer: bool,
    llama: bool,
    json_file: Path | None,
) -> None:
    import torch

    from rorqual.cli import benchmarks as b
    from rorqual.ops.cores import physical_cores

    on_cpu = device == "cpu"
    dtype = dtype or ("float32" if on_cpu else "bfloat16")
    if dtype not in b.BYTES:
        raise typer.BadParameter(f"{dtype!r} is not one of {', '.join(b.BYTES)}", param_hint="--dtype")
    work, weights = b.Work(*shape), b.Weights(model, device)
    weights.make_room(work.prompt + work.new)
    count = threads or physical_cores()
    engines: dict[str, Callable[[], float | None]] = {"rorqual": b.Generation(weights, device, work, dtype, count).run}
    deterministic, overlap, prompt_graphs = more
    if deterministic:
        engines["rorqual deterministic"] = b.Generation(weights, device, work, dtype, count, True).run
    for said, option in ((overlap, "--overlap"), (prompt_graphs, "--prompt-graphs")):
        if said and on_cpu:
            raise typer.BadParameter("there is a difference on a GPU only", param_hint=option)
    if overlap:
        engines["rorqual one by one"] = b.Generation(weights, device, work, dtype, count, overlap=False).run
    if prompt_graphs:
        engines["rorqual captured"] = b.Generation(weights, device, work, dtype, count, prompt_graphs=True).run
    if llama and on_cpu and dtype in b.LlamaGeneration.KINDS and b.llama_python():
        other = b.LlamaGeneration(weights, work, dtype, count)
        engines[f"llama.cpp {other.kind}"] = other.run
    if peer:
        engines["transformers"] = b.Threads(b.PeerGeneration(weights, device, work).run, count).run
    tokens = work.batch * (work.prompt if kind == "prefill" else work.new)
    if on_cpu:
        torch.set_num_threads(count)
    bound = partial(b.generation_bound, weights.cfg, kind, device, work, dtype)
    before = bound()
    rates = {name: [tokens / s for s in seconds] for name, seconds in interleaved(engines, rounds, device).items()}
    facts = {"model": model, **work._asdict(), "dtype": dtype}
    if on_cpu:
        facts["threads"] = count
    report(kind, facts, rates, *max(before, bound()), device, json_file)


@app.command()
def serve(
    model: Model = "bench-cpu",
    device: Device = "cpu",
    requests: Annotated[int, typer.Option(help="Requests, all there at the start.", min=2)] = 64,
    dtype: Dtype = "",
    threads: Threads = 0,
    max_num_seqs: Annotated[int, typer.Option(help="Most requests computed at once.", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds; medians are reported.", min=1)] = 3,
    seconds: Annotated[
        float, typer.Option(help="All rounds end within so many; whole ones count. 0: no bound.", min=0)
    ] = 0,
    prompt_graphs: AlsoPromptGraphs = False,
    llama: Llama = True,
    json_file: JsonFile = None,
) -> None:
    """Continuous batching: mixed requests (prompts of 16 to 1,024 tokens, answers of 16 to 256), against the time of the
    same forwards back to back (what lies above 1 is the engine's own), and against llama.cpp batching continuously too.

    On a GPU, where kernels are chosen and steps captured for every new shape, each round's requests come twice: the
    first time is told beside the second, which counts.

    Example:

        rorqual bench serve --model bench-cpu --dtype int8
    """
    from rorqual.cli import benchmarks as b
    from rorqual.cli import serving
    from rorqual.ops.cores import physical_cores

    dtype, on_gpu = dtype or ("float32" if device == "cpu" else "bfloat16"), device.startswith("cuda")
    weights, traffic = b.Weights(model, device), serving.Traffic(requests)
    weights.make_room(traffic.prompt[1] + traffic.new[1])
    core = b.engine(weights, device, max_num_seqs, dtype, threads)
    engines: dict[str, serving.Serve] = {"rorqual": partial(serving.serve, core, traffic)}
    if prompt_graphs:
        if not on_gpu:
            raise typer.BadParameter("there is a difference on a GPU only", param_hint="--prompt-graphs")
        captured = b.engine(weights, device, max_num_seqs, dtype, threads, prompt_graphs=True)
        engines["rorqual captured"] = partial(serving.serve, captured, traffic)
    if llama and device == "cpu" and dtype in b.LlamaGeneration.KINDS and b.llama_python():
        room = b.Work(max_num_seqs, traffic.prompt[1], traffic.new[1])
        peer = b.LlamaGeneration(weights, room, dtype, threads or physical_cores())
        engines[f"llama.cpp {peer.kind}"] = lambda seed, until: peer.serve(traffic.lengths(seed), seed)
    serving.serve(core, serving.Traffic(4), 0)
    rows, done = serving.rounds(engines, rounds, seconds, on_gpu, typer.echo)
    if not rows:
        typer.echo(f"not one round ended within {seconds:g} s: raise --seconds or lower --requests", err=True)
        raise typer.Exit(1)
    facts = {"model": model, "requests": requests, "max_num_seqs": max_num_seqs, "dtype": dtype, "rounds": done}
    finish("serve", facts, rows, device, json_file)


@app.command()
def ready(
    model: Model = "bench-cpu",
    dtype: Annotated[
        list[str] | None, typer.Option(help="auto, float32, bfloat16, int8, int4; several at once.")
    ] = None,
    rounds: Rounds = 3,
    json_file: JsonFile = None,
) -> None:
    """Starting the CPU engine in a fresh process: seconds until it can serve and memory it holds, both beyond `import
    torch`, after loading and after a prompt of 512 tokens and 100 more, over packed weights and cache.

    Example:

        rorqual bench ready --model rorqual-mini --dtype int8
    """
    from rorqual.cli import benchmarks as b
    from rorqual.cli import starting

    weights = b.Weights(model)
    rows = [starting.measure(weights.path, kind, rounds) for kind in dtype or ["float32", "bfloat16", "int8", "int4"]]
    finish("ready", {"model": model, "rounds": rounds}, rows, "cpu", json_file)


@app.command()
def mtp(
    model: Annotated[str, typer.Option(help="A model with an MTP module that was trained.")] = DEFAULT_MODEL,
    device: Device = "cpu",
    prompts: Annotated[int, typer.Option(help="Prompts: beginnings of paragraphs of --text.", min=1)] = 16,
    new: Annotated[int, typer.Option(help="Tokens after each.", min=2)] = 128,
    text: Annotated[Path, typer.Option(help="Where the prompts come from.")] = Path("README.md"),
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    json_file: JsonFile = None,
) -> None:
    """Speculation by the MTP module: acceptance, costs, and how much of the speed-up they allow is reached.

    Example:

        rorqual bench mtp --device cuda
    """
    from rorqual.cli import benchmarks as b
    from rorqual.cli import serving
    from rorqual.data.tokenizer import Tokenizer

    weights = b.Weights(model, device)
    tokenizer = Tokenizer.load(weights.path)
    paragraphs = [p for p in text.read_text(encoding="utf-8").split("\n\n") if len(p) > 100]
    starts = [(tokenizer.bos_id, *tokenizer.encode(p)[:24]) for p in paragraphs[:prompts]]
    if not starts:
        raise typer.BadParameter(f"{text} has no paragraph of more than 100 characters", param_hint="--text")
    drafted, plain = (b.engine(weights, device, 1, dtype, threads, speculation=k) for k in (1, 0))
    row = serving.mtp(drafted, plain, starts, new)
    facts = {"model": model, "prompts": len(starts), "new": new, "dtype": dtype}
    finish("mtp", facts, [row], device, json_file)


@app.command()
def layer(
    model: Annotated[str, typer.Option(help="A preset whose dimensions the layers have.")] = "deepseek-v3",
    device: Device = "cuda",
    part: Annotated[list[str] | None, typer.Option(help="dense, moe or mtp; default: all three.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences in a decoding step; default 1, 32, 256.")] = None,
    context: Annotated[int, typer.Option(help="Cached tokens of each sequence.")] = 1024,
    tokens: Annotated[int, typer.Option(help="Tokens of the row compared with transformers.")] = 64,
    peer: Peer = True,
    json_file: JsonFile = None,
) -> None:
    """One layer of each kind at true size, random FP8 weights: agreement with transformers' layer, and the time of a
    decoding step against the bytes and operations it must cost.

    Example:

        rorqual bench layer --model deepseek-v3 --device cuda --json benchmarks/layers.json
    """
    import torch

    from rorqual.cli import layers
    from rorqual.config import ModelConfig
    from rorqual.train.hardware import peak_flops

    cfg = ModelConfig.load(model)
    bandwidth = layers.copy_bandwidth(device)
    peak = peak_flops(torch.device(device))[0]
    agreement: list[dict[str, Any]] = []
    times: list[dict[str, Any]] = []
    for name in part or layers.PARTS:
        if peer:
            for std in (0.006, 0.02):
                agreement += layers.agreement(cfg, name, device, std, tokens)
        one = layers.Layer(cfg, name, device)
        for scheme in ("weight_only", "dynamic"):
            one.use(torch.bfloat16, scheme)
            one.absorb()
            for n in batch or (1, 32, 256):
                with torch.inference_mode():
                    step = layers.decode_step(one, n, context, device)
                    seconds = layers.timed(step)
                    moved = layers.step_bytes(one, n, context, step()[1])
                bound = max(moved / bandwidth, layers.step_flops(one, n, context) / peak)
                times.append(
                    {
                        "part": name, "activations": scheme, "batch": n, "microseconds": seconds * 1e6,
                        "gigabytes": moved / 1e9, "gigabytes_per_s": moved / seconds / 1e9,
                        "bound_microseconds": bound * 1e6, "of_bound": bound / seconds,
                    }
                )  # fmt: skip
        del one
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
    result = {
        "kind": "layers", "model": model, "context": context, "copy_bytes_per_s": bandwidth, "peak_flops": peak,
        "agreement": agreement, "times": times, "environment": environment(device),
    }  # fmt: skip
    for title, rows in (("agreement with transformers in fp32", agreement), ("a decoding step", times)):
        print_rows(title, rows)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    if any(row["error"] > row["bound"] for row in agreement if row["std"] == 0.006):
        raise typer.Exit(1)


@app.command()
def attention(
    device: Device = "cuda",
    heads: Annotated[list[int] | None, typer.Option(help="Query heads; default 16 and 128.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences; default 1 and 64.")] = None,
    context: Annotated[int, typer.Option(help="Cached tokens of each.", min=1)] = 8192,
    json_file: JsonFile = None,
) -> None:
    """Decoding attention over latent pages (512 + 64 numbers a token, bf16) by the kernel: microseconds, TFLOP/s, GB/s and
    its share of the measured copy bandwidth, and the error against the reference.

    Example:

        rorqual bench attention --heads 128 --batch 64 --context 8192
    """
    from rorqual.cli import layers

    rows = layers.attention(device, heads or [16, 128], batch or [1, 64], context)
    finish("attention", {"context": context}, rows, device, json_file)


@app.command()
def ops(
    model: Annotated[str, typer.Option(help="A preset whose dimensions the weights have.")] = "deepseek-v3",
    device: Device = "cuda",
    rows: Annotated[list[int] | None, typer.Option(help="Rows of the activations.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Products with block-scaled FP8 weights by every backend and shape, in microseconds, with their errors.

    Example:

        rorqual bench ops --model deepseek-v3 --rows 1 --rows 4096
    """
    from rorqual.cli import layers
    from rorqual.config import ModelConfig

    table = layers.products(ModelConfig.load(model), device, rows or [1, 16, 64, 256, 1024, 4096])
    print_rows("microseconds of x W^T", table)
    result = {"kind": "fp8 products", "model": model, "rows": table, "environment": environment(device)}
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")


@app.command()
def load(
    model: Model = "bench-cpu",
    rounds: Rounds = 5,
    json_file: JsonFile = None,
) -> None:
    """Loading a checkpoint until its weights are in memory, against reading the same bytes: into a buffer, and through a
    map. Cold (from disk) and warm (from the page cache); ratio is the time of load_model by the row's.

    A preset is written to a temporary folder in bf16 first; TMPDIR says where.

    Example:

        rorqual bench load --model bench-gpu --json benchmarks/load.json
    """
    from rorqual.checkpoint.shards import find_shards
    from rorqual.cli import loading

    with loading.checkpoint(model) as directory:
        files = find_shards(directory)
        facts = {
            "model": model,
            "tensors": len(files),
            "bytes": sum(file.stat().st_size for file in set(files.values())),
        }
        seconds = interleaved(loading.works(directory), rounds, "cpu")
    rows, where = loading.table(seconds), environment("cpu")
    print_rows("load: " + ", ".join(f"{k} {v}" for k, v in facts.items()), rows)
    typer.echo(", ".join(f"{k} {v}" for k, v in where.items()))
    if json_file is not None:
        result = {"kind": "load", **facts, "rounds": rounds, "rows": rows, "seconds": seconds, "environment": where}
        json_file.write_text(json.dumps(result, indent=1) + "\n")
