"""`rorqual inspect`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def inspect(
    model: Annotated[
        str, typer.Argument(help="A model directory, a preset, or a bundled model.", metavar="DIR|PRESET")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    context: Annotated[int, typer.Option(help="Context length for the operation counts.", min=1)] = 4096,
) -> None:
    """Show what a configuration amounts to: parameters by part, cache, operations, memory.

    The network is built on the meta device (no memory, any size) and counted there.

    Examples:

        rorqual inspect deepseek-v3

        rorqual inspect models/rorqual-nano --json
    """
    facts = report(model, context)
    typer.echo(json.dumps(facts, indent=2)) if as_json else _print(facts)


def report(model: str, context: int) -> dict[str, Any]:
    """The facts as plain data. Raises ConfigError; asserts that the built network has the counted parameters."""
    from rorqual.config import ModelConfig, resolve_model
    from rorqual.errors import ConfigError
    from rorqual.model.transformer import Transformer
    from rorqual.plan import count

    try:
        cfg = ModelConfig.load(model)
    except ConfigError as error:
        try:
            cfg = ModelConfig.load(resolve_model(model))
        except ConfigError:
            raise error from None
    built = Transformer(cfg, device="meta")
    tensors = [*built.named_parameters(), *built.named_buffers()]
    n_built = sum(t.numel() for name, t in tensors if name != "rope_speeds")
    parts = count.parts(cfg)
    assert n_built == sum(p.total for p in parts), "the closed form and the network disagree"
    total, active = count.totals(cfg)
    mtp = parts[-1]
    bytes_per = {"fp32": 4, "bf16": 2, "fp8": 1}
    return {
        "model": model,
        "parameters": {"total": total, "active": active, "mtp": mtp.total, "with_mtp": total + mtp.total},
        "parts": [{"name": p.name, "total": p.total, "active": p.active} for p in parts],
        "cache_bytes_per_token": {
            "bf16": count.cache_bytes_per_token(cfg, 2),
            "fp32": count.cache_bytes_per_token(cfg, 4),
        },
        "flops_per_token": {
            "context": context,
            "forward": count.forward_flops_per_token(cfg, context),
            "training": count.training_flops_per_token(cfg, context),
        },
        "weight_bytes": {name: (total + mtp.total) * b for name, b in bytes_per.items()},
        "layers": cfg.num_hidden_layers,
        "context": cfg.max_position_embeddings,
        "vocabulary": cfg.vocab_size,
    }


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    p, console = facts["parameters"], Console()
    table = Table(
        title=f"{facts['model']}: {p['total']:,} parameters, {p['active'] / 1e9:.2f} B active", title_justify="left"
    )
    for column, justify in (("part", "left"), ("total", "right"), ("active on a token", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for part in facts["parts"][:-1]:
        table.add_row(part["name"], f"{part['total']:,}", f"{part['active']:,}")
    table.add_section()
    table.add_row("main model", f"{p['total']:,}", f"{p['active']:,}")
    mtp = facts["parts"][-1]
    table.add_row("MTP modules (apart)", f"{mtp['total']:,}", f"{mtp['active']:,}")
    console.print(table)
    cache, flops = facts["cache_bytes_per_token"], facts["flops_per_token"]
    console.print(f"cache: {cache['bf16']:,} bytes a token in bf16, {cache['fp32']:,} in fp32")
    console.print(
        f"operations a token at context {flops['context']:,}: forward {flops['forward'] / 1e9:.3g} GFLOP, "
        f"training {flops['training'] / 1e9:.3g} GFLOP"
    )
    sizes = ", ".join(f"{name} {size / 1e9:,.3g} GB" for name, size in facts["weight_bytes"].items())
    console.print(f"weights with MTP: {sizes}")
    console.print(f"{facts['layers']} layers, vocabulary {facts['vocabulary']:,}, context {facts['context']:,}")
