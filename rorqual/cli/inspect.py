"""`rorqual inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rorqual.config import ModelConfig


def inspect(
    model: Annotated[
        str, typer.Argument(help="A model directory, a preset, or a bundled model.", metavar="DIR|PRESET")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    context: Annotated[int, typer.Option(help="Context length for the operation counts.", min=1)] = 4096,
    svg: Annotated[
        Path | None, typer.Option(help="Also draw the architecture with its numbers into this file.", metavar="FILE")
    ] = None,
) -> None:
    """Show what a configuration amounts to: parameters by part, cache, operations, memory.

    The network is built on the meta device (no memory, any size) and counted there.

    Examples:

        rorqual inspect deepseek-v3

        rorqual inspect rorqual-mini --json

        rorqual inspect kimi-k2 --svg kimi-k2.svg
    """
    cfg = find(model)
    facts = report(model, context, cfg)
    if svg is not None:
        _draw(cfg, model, svg)
    typer.echo(json.dumps(facts, indent=2)) if as_json else _print(facts)


def find(model: str) -> ModelConfig:
    """A configuration by directory, preset or bundled name. Raises ConfigError."""
    from rorqual.config import ModelConfig, resolve_model
    from rorqual.errors import ConfigError

    try:
        return ModelConfig.load(model)
    except ConfigError as error:
        try:
            return ModelConfig.load(resolve_model(model))
        except ConfigError:
            raise error from None


def report(model: str, context: int, cfg: ModelConfig | None = None) -> dict[str, Any]:
    """The facts as plain data. Raises ConfigError; asserts that the built network has the counted parameters."""
    from rorqual.model.transformer import Transformer
    from rorqual.plan import count

    cfg = cfg or find(model)
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
        "fp8_cache_bytes_per_token": count.fp8_cache_bytes_per_token(cfg),
        "flops_per_token": {
            "context": context,
            "forward": count.forward_flops_per_token(cfg, context),
            "forward_weights": count.weight_flops_per_token(cfg),
            "forward_attention": count.attention_flops_per_token(cfg, context / 2),
            "decode": count.decode_flops_per_token(cfg, context),
            "decode_attention": count.attention_flops_per_token(cfg, context, absorbed=True),
            "training": count.training_flops_per_token(cfg, context),
        },
        "weight_bytes": {name: (total + mtp.total) * b for name, b in bytes_per.items()},
        "stored_bytes": {form: count.stored_bytes(cfg, form) for form in count.FORMS},
        "fp8_release": {
            "tensors": count.stored_tensors(cfg, "fp8", copies=True),
            "bytes": count.stored_bytes(cfg, "fp8", copies=True),
        },
        "quantization_config": cfg.quantization_config,
        "layers": cfg.num_hidden_layers,
        "context": cfg.max_position_embeddings,
        "vocabulary": cfg.vocab_size,
    }


def _draw(cfg: ModelConfig, name: str, file: Path) -> None:
    from rorqual.errors import ConfigError
    from rorqual.plan.picture import draw

    try:
        file.write_text(draw(cfg, Path(name).resolve().name if Path(name).is_dir() else name), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}", remedy="choose another --svg file") from None


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    p, console = facts["parameters"], Console(highlight=False)
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
    for line in _lines(facts):
        console.print(line, markup=False, soft_wrap=True)


def _lines(facts: dict[str, Any]) -> list[str]:
    """What stands below the table."""
    cache, flops, release = facts["cache_bytes_per_token"], facts["flops_per_token"], facts["fp8_release"]

    def giga(key: str) -> str:
        return f"{flops[key] / 1e9:.3g}"

    sizes = ", ".join(f"{name} {_size(n)}" for name, n in facts["stored_bytes"].items())
    quantised = facts["quantization_config"]
    stored = "as config.json's torch_dtype says"
    if quantised:
        stored = ", ".join(f"{k} {_plain(v)}" for k, v in quantised.items())
    return [
        f"cache: {cache['bf16']:,} bytes a token in bf16, {cache['fp32']:,} in fp32, "
        f"{facts['fp8_cache_bytes_per_token']:,} in FP8 (rotary key bf16, fp32 scales)",
        f"operations a token at context {flops['context']:,}: forward {giga('forward')} GFLOP (weights "
        f"{giga('forward_weights')}, attention {giga('forward_attention')}), training {giga('training')} GFLOP",
        f"next token after {flops['context']:,} cached, absorbed form: {giga('decode')} GFLOP "
        f"(attention {giga('decode_attention')})",
        f"weights with MTP: {sizes}",
        f"released form in FP8, shared tables stored again: {release['tensors']:,} tensors, {release['bytes']:,} bytes",
        f"weights are stored: {stored}",
        f"{facts['layers']} layers, vocabulary {facts['vocabulary']:,}, context {facts['context']:,}",
    ]


def _plain(value: Any) -> str:
    """A value of quantization_config in a few words."""
    if isinstance(value, list | tuple):
        return "x".join(map(str, value))
    return "{…}" if isinstance(value, dict) else str(value)


def _size(n: int) -> str:
    return f"{n / 1e9:,.2f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB"
