"""`rorqual bench profile` and `rorqual bench soak`: where the engine's steps go, and whether it keeps for long."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from rorqual.cli.bench_options import Deterministic, Device, Dtype, JsonFile, Model, Threads
from rorqual.cli.bench_report import finish


def profile(
    model: Model = "bench-gpu",
    kind: Annotated[str, typer.Option(help="decode: steps of one token a sequence; prefill: prompts read.")] = "decode",
    device: Device = "cuda",
    batch: Annotated[int, typer.Option(help="Sequences side by side.", min=1)] = 1,
    prompt: Annotated[int, typer.Option(help="Prompt tokens of each.", min=1)] = 512,
    steps: Annotated[int, typer.Option(help="Steps to profile.", min=1)] = 20,
    top: Annotated[int, typer.Option(help="Kernels to print; the JSON has all.", min=1)] = 25,
    speculation: Annotated[int, typer.Option(help="Tokens drafted by the MTP module.", min=0, max=3)] = 0,
    deterministic: Deterministic = False,
    dtype: Dtype = "",
    threads: Threads = 0,
    json_file: JsonFile = None,
) -> None:
    """Where a step's time goes, by torch's profiler: kernels by their time (on a CPU, torch's operators), calls and
    microseconds a step, and what share of the wall time they cover. A closer look at one kernel is ncu's, where it is
    installed: `ncu --kernel-name NAME rorqual bench decode …`.

    Example:

        rorqual bench profile --kind decode --model bench-gpu --batch 32 --device cuda
    """
    from rorqual.cli import benchmarks as b
    from rorqual.cli import profiling

    if kind not in ("decode", "prefill"):
        raise typer.BadParameter(f"{kind!r} is neither decode nor prefill", param_hint="--kind")
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    weights = b.Weights(model, device)
    room = prompt + (1 + speculation) * profiling.decoded(steps) if kind == "decode" else prompt + 2
    weights.make_room(room)
    core = b.engine(
        weights, device, batch, dtype, threads, speculation, max_model_len=room,
        deterministic=deterministic or "auto", kernels="torch" if device == "cpu" else "auto",
    )  # fmt: skip
    result = profiling.profile(core, kind, batch, prompt, steps)
    facts = {
        "model": model,
        "batch": batch,
        "prompt": prompt,
        "dtype": dtype,
        "steps": steps,
        "speculation": speculation,
    }
    finish(f"profile {kind}", facts | result.totals, result.kernels, device, json_file, top)


def soak(
    model: Model = "bench-cpu",
    device: Device = "cpu",
    minutes: Annotated[float, typer.Option(help="Simulated minutes of arrivals.", min=0.01)] = 30,
    rate: Annotated[float, typer.Option(help="Requests a simulated second, on average.", min=0.01)] = 4,
    step_ms: Annotated[float, typer.Option(help="Simulated milliseconds of an engine step.", min=0.1)] = 20,
    cache_tokens: Annotated[int, typer.Option(help="Size of the cache; 0: two longest requests.", min=0)] = 0,
    max_num_seqs: Annotated[int, typer.Option(help="Most requests computed at once.", min=1)] = 32,
    speculation: Annotated[
        int, typer.Option(help="Tokens drafted by the MTP module; -1 measures.", min=-1, max=3)
    ] = -1,
    seed: Annotated[int, typer.Option(help="Of the traffic.")] = 0,
    dtype: Dtype = "",
    threads: Threads = 0,
    json_file: JsonFile = None,
) -> None:
    """Random traffic for a long simulated time: Poisson arrivals, prompts and answers of mixed lengths, shared prefixes,
    greedy and sampled, some aborted, some under a grammar (where the model has a tokenizer and
    llguidance is installed), in a cache too small for all.

    The clock is simulated: a step takes --step-ms of it however long it takes here. After each fifth the engine is left
    to finish, and its pages and memory are counted. Exits with 1 unless every request ended exactly once and without an
    error, every page came back, and memory is flat from the second fifth on.

    Example:

        rorqual bench soak --model bench-gpu --device cuda --minutes 30 --json benchmarks/gpu-soak.json
    """
    from rorqual.cli import benchmarks as b
    from rorqual.cli import soaking

    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    weights = b.Weights(model, device)
    traffic = soaking.Traffic.of(weights.cfg, minutes, rate, step_ms / 1000, seed)
    core = b.engine(
        weights, device, max_num_seqs, dtype, threads, "auto" if speculation < 0 else speculation, prefix_cache=True,
        cache_tokens=cache_tokens or 2 * traffic.longest, max_model_len=traffic.longest,
    )  # fmt: skip
    with_tokenizer = weights.preset is None and (weights.path / "tokenizer.json").exists()
    grammars = with_tokenizer and find_spec("llguidance") is not None
    record, fifths = soaking.soak(core, traffic, grammars, device)
    facts = {"model": model, "dtype": dtype, "minutes": minutes, "rate": rate, "step_ms": step_ms, "seed": seed}
    facts |= {"grammars": grammars}
    finish("traffic soak", facts | record, fifths, device, json_file)
    if record["faults"]:
        raise typer.Exit(1)
