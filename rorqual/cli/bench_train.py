"""`rorqual bench train`: training steps of ours and of the peers that are installed, in one run, and single layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from rorqual.cli.bench_report import environment, interleaved, print_rows, report


def train(
    model: Annotated[str, typer.Option(help="A preset or a model directory; weights are random.")] = "bench-cpu",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 8,
    micro_batch: Annotated[int, typer.Option(help="Sequences a micro-batch; 0 means all.")] = 0,
    seq_len: Annotated[int, typer.Option(help="Tokens a sequence.")] = 512,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            help="fp32, bf16, fp8, or fp8/BACKEND for one way of its products (triton, scaled_mm, hopper, expanded); "
            "several at once. Default bf16 on a GPU, fp32 on a CPU; --layers: bf16 and fp8."
        ),
    ] = None,
    num_layers: Annotated[int, typer.Option(help="So many layers of the model only, as many as fit; 0: all.")] = 0,
    compile: Annotated[bool, typer.Option(help="Compile the blocks in place of our kernels.")] = False,
    graph: Annotated[bool, typer.Option(help="On a GPU, run forward and backward as one captured CUDA graph.")] = True,
    moments: Annotated[str, typer.Option(help="Of our AdamW: bfloat16, as published, or float32.")] = "bfloat16",
    layers: Annotated[
        str, typer.Option(help="In place of steps: forward and backward of single layers of this preset.")
    ] = "",
    products: Annotated[
        str, typer.Option(help="In place of steps: single products of this preset's layers, bf16 and every way of FP8.")
    ] = "",
    rounds: Annotated[
        int, typer.Option(help="Rounds; the engines take turns in each, medians are reported.", min=1)
    ] = 5,
    peer: Annotated[
        bool, typer.Option("--peer/--no-peer", help="Measure transformers and torchtitan 0.2.2 too, where installed.")
    ] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the result as JSON.", metavar="FILE")
    ] = None,
) -> None:
    """Training steps (forward, backward, AdamW) on random tokens: rate, peak memory, MFU by the paper's FLOP count.

    Example:

        rorqual bench train --model bench-gpu --device cuda --batch 8 --seq-len 2048 --precision bf16 --precision fp8
    """
    import torch

    from rorqual.config import ModelConfig
    from rorqual.errors import ConfigError
    from rorqual.ops.fp8_train import fp8_products

    for kind in precision or []:
        name, slash, backend = kind.partition("/")
        if name not in ("fp32", "bf16", "fp8") or (slash and name != "fp8"):
            raise typer.BadParameter(f"{kind!r} is not one of fp32, bf16, fp8, fp8/BACKEND", param_hint="--precision")
        if slash:
            fp8_products.get(backend)
    if products and (layers or precision):
        raise typer.BadParameter("measures every precision, and no layers", param_hint="--products")
    if layers:
        _layers(ModelConfig.load(layers), layers, device, batch, seq_len, precision or ["bf16", "fp8"], json_file)
        return
    if products:
        _products(ModelConfig.load(products), products, device, batch * seq_len, json_file)
        return
    cfg = ModelConfig.load(model)
    if num_layers:
        if not 0 < num_layers <= cfg.num_hidden_layers:
            raise ConfigError(f"{model} has {cfg.num_hidden_layers} layers, not {num_layers}")
        cfg = cfg.replace(num_hidden_layers=num_layers)
    kinds = precision or (["bf16"] if device.startswith("cuda") else ["fp32"])
    shape = batch, micro_batch or batch, seq_len
    facts = {"model": model, "layers": cfg.num_hidden_layers, "batch": batch, "seq_len": seq_len, "compile": compile}
    _steps(cfg, torch.device(device), shape, kinds, (compile, graph, moments), rounds, peer, facts, json_file)


def _steps(cfg, device, shape, kinds, how, rounds, peer, facts, json_file) -> None:  # type: ignore[no-untyped-def]
    from rorqual.cli import training_benchmarks as t
    from rorqual.plan.count import training_flops_per_token
    from rorqual.train.hardware import peak_flops

    batch, micro, seq_len = shape
    makers: dict[str, Callable[[], t.Steps]] = {}
    for kind in kinds:
        name = "rorqual" if len(kinds) == 1 else f"rorqual {kind}"
        makers[name] = lambda kind=kind: t.Training(cfg, device, batch, micro, seq_len, kind, *how)  # type: ignore[misc]
    if peer:
        makers |= t.peers(cfg, device, batch, seq_len)
    before = peak_flops(device)
    flops = training_flops_per_token(cfg, seq_len)
    engines, more = {}, {}
    for name, make in makers.items():
        if (built := t.with_memory(make, device)) is not None:
            engines[name], more[name] = built[0].step, {} if built[1] is None else {"peak GiB": built[1] / 2**30}
        else:
            typer.echo(f"{name}: out of memory, left out")
    seconds = interleaved(engines, rounds, device.type)
    rates = {name: [batch * seq_len / s for s in each] for name, each in seconds.items()}
    facts |= {"graph": how[1], "moments": how[2], "flops_per_token": flops}
    peak, source = max(before, peak_flops(device))
    report("train", facts, rates, peak / flops, source, device.type, json_file, more)


def _layers(cfg, name, device, batch, seq_len, kinds, json_file) -> None:  # type: ignore[no-untyped-def]
    from rorqual.cli import train_layers

    rows = train_layers.table(cfg, device, batch, seq_len, kinds)
    print_rows(f"layers of {name}, forward and backward of {batch} x {seq_len} tokens, microseconds", rows)
    if json_file is not None:
        result = {"kind": "training layers", "model": name, "batch": batch, "seq_len": seq_len, "rows": rows}
        json_file.write_text(json.dumps(result | {"environment": environment(device)}, indent=1) + "\n")


def _products(cfg, name, device, tokens, json_file) -> None:  # type: ignore[no-untyped-def]
    from rorqual.cli import train_products

    rows = train_products.table(cfg, device, tokens)
    print_rows(f"products of {name} in training, {tokens} tokens, microseconds", [r for r in rows if "product" in r])
    print_rows("quantising for them, microseconds", [r for r in rows if "product" not in r])
    if json_file is not None:
        result = {"kind": "training products", "model": name, "tokens": tokens, "rows": rows}
        json_file.write_text(json.dumps(result | {"environment": environment(device)}, indent=1) + "\n")
