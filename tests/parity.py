"""Random small configurations and their transformers twins: shared by the parity tests and `benchmarks/parity.py`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import transformers

from rorqual.checkpoint import save_model
from rorqual.config import ModelConfig
from rorqual.model.transformer import Transformer

YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip


def draw(seed: int) -> ModelConfig:
    """A configuration drawn from everything the architecture allows; the first twelve seeds cover every feature."""
    r = random.Random(seed)
    groups, kept = [(1, 1), (4, 2), (2, 1), (4, 3)][seed % 4]
    layers = r.choice([2, 3, 4])
    return ModelConfig(
        vocab_size=r.choice([97, 128, 250]),
        hidden_size=r.choice([40, 64, 72]),
        num_hidden_layers=layers,
        num_attention_heads=r.choice([1, 2, 3, 5]),
        q_lora_rank=[None, 24, 17][seed % 3],
        kv_lora_rank=r.choice([12, 19, 32]),
        qk_nope_head_dim=r.choice([8, 11, 16]),
        qk_rope_head_dim=r.choice([4, 8, 14]),
        v_head_dim=r.choice([7, 8, 16]),
        intermediate_size=r.choice([50, 96]),
        moe_intermediate_size=r.choice([9, 16, 24]),
        n_routed_experts=r.choice([8, 16]),
        n_shared_experts=r.choice([1, 2]),
        num_experts_per_tok=r.choice([1, 2, 4]),
        n_group=groups,
        topk_group=kept,
        first_k_dense_replace=min(seed % 4, layers),
        norm_topk_prob=seed % 5 != 0,
        routed_scaling_factor=r.choice([1.0, 2.5]),
        rope_theta=r.choice([10000.0, 100000.0]),
        rope_scaling=[None, YARN, {k: v for k, v in YARN.items() if "mscale" not in k}][seed // 2 % 3],
        max_position_embeddings=4096,
        tie_word_embeddings=seed % 2 == 1,
        initializer_range=0.08,
    )


def build(cfg: ModelConfig, seed: int, **options: Any) -> Transformer:
    """A model with random weights, norms and correction biases, so that every term of the forward counts."""
    torch.manual_seed(seed)
    model = Transformer(cfg, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1)
    return model


def twin(model: Transformer, directory: Path) -> Any:
    """transformers' model of the same weights, through a saved checkpoint."""
    save_model(model, directory)
    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )


def compare(seed: int, directory: Path) -> dict[str, Any]:
    """One row of the parity table: a drawn configuration, and how far logits and gradients are apart."""
    import torch.nn.functional as F

    cfg = draw(seed)
    model = build(cfg, seed)
    peer = twin(model, directory)
    tokens, targets = torch.randint(0, cfg.vocab_size, (2, 81)), torch.randint(0, cfg.vocab_size, (2 * 81,))
    ours, theirs = model(tokens), peer(tokens).logits
    for logits in (ours, theirs):
        F.cross_entropy(logits.flatten(0, 1), targets).backward()
    pairs = [
        (p.grad, peer.get_parameter(n if n.startswith("lm_head") else f"model.{n}").grad)
        for n, p in model.named_parameters()
        if p.grad is not None
    ]
    difference = sum((a - b).norm() ** 2 for a, b in pairs) ** 0.5
    reference = sum(b.norm() ** 2 for _, b in pairs) ** 0.5
    return {
        "seed": seed,
        "q_lora_rank": cfg.q_lora_rank,
        "groups": f"{cfg.topk_group}/{cfg.n_group}",
        "yarn": cfg.rope_scaling is not None,
        "dense": cfg.first_k_dense_replace,
        "tied": cfg.tie_word_embeddings,
        "hidden": cfg.hidden_size,
        "logits_max_abs": (ours - theirs).abs().max().item(),
        "gradient_relative": (difference / reference).item(),
    }


def main() -> None:
    import argparse
    import json
    import tempfile

    from rich.console import Console
    from rich.table import Table

    from rorqual.cli.bench_report import environment

    parser = argparse.ArgumentParser(description="The parity table against transformers, fp32 on the CPU.")
    parser.add_argument("--configs", type=int, default=14)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for seed in range(options.configs):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compare(seed, Path(folder) / "model"))
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{v:.1e}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)
    result = {"kind": "parity", "rows": rows, "environment": environment("cpu")}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
