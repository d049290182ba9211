"""Conversion: exact where it can be, plain files at the end, and each step no worse than the next."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from rorqual.checkpoint import load_model
from rorqual.checkpoint.gguf import export_gguf
from rorqual.checkpoint.source import Source
from rorqual.cli.main import app
from rorqual.data.template import ChatTemplate
from rorqual.data.tokenizer import Tokenizer
from rorqual.errors import ConfigError, DataError
from rorqual.model.layers import MLP
from rorqual.post.llama import Llama, LlamaConfig, names
from rorqual.post.llama_files import LlamaSource
from rorqual.post.upcycle import UpcycleConfig, convert, expert_shape, layer_inputs, released_config, upcycle
from rorqual.post.upcycle_attention import convert_attention
from rorqual.post.upcycle_experts import ExpertShape, balanced_groups, convert_experts
from rorqual.post.upcycle_mtp import agreement
from tests.unit.post.conftest import TINY, make_llama

TOKENS = torch.randint(0, TINY.vocab_size, (3, 40), generator=torch.Generator().manual_seed(5))
ROWS = torch.randint(0, TINY.vocab_size, (12, 64), generator=torch.Generator().manual_seed(6))
EXACT = UpcycleConfig(rank=32, routed=6, top_k=6, fold=1, dense_layers=1)


def source_of(model: Llama) -> LlamaSource:
    parameters = dict(model.named_parameters())
    places = dict(names(model.cfg))
    return LlamaSource(model.cfg, lambda name: parameters[places[name]].detach().clone(), None)


def share_keys(model: Llama) -> Llama:
    """Grouped keys that are multiples of one another: then one rotary key can hold them all."""
    d = model.cfg.head_dim
    with torch.no_grad():
        for layer in model.layers:
            k = layer.self_attn.k_proj.weight
            for g in range(1, model.cfg.num_key_value_heads):
                k[g * d : (g + 1) * d] = (1.5 - g) * k[:d]
    return model


@pytest.mark.parametrize("case", ["one key head", "keys that are multiples", "wide latent"])
def test_the_conversion_is_exact_where_nothing_is_lost(case: str) -> None:
    """A latent as wide as the input and all experts chosen: the source's logits to 1e-4."""
    model = make_llama(num_key_value_heads=1) if case == "one key head" else share_keys(make_llama())
    cfg = dataclasses.replace(EXACT, rank=64) if case == "wide latent" else EXACT
    done = convert(source_of(model), ROWS, cfg)
    with torch.no_grad():
        assert torch.allclose(done.model(TOKENS), model(TOKENS), atol=1e-4, rtol=0)
    assert all(m.kl < 1e-6 for m in done.measures)


def test_every_step_is_measured_and_costs_something() -> None:
    model = make_llama()
    done = convert(source_of(model), ROWS, UpcycleConfig(rank=24, routed=6, top_k=3, fold=1))
    source, rotary, latent, experts = done.measures
    assert source.kl == 0 and source.top1 == 1
    assert 0 < rotary.kl < latent.kl < experts.kl
    assert (done.cache_before, done.cache_after) == (3 * 2 * 2 * 8, 3 * (24 + 8))
    # The measure itself, computed again: cross-entropy and divergence over the held-back rows.
    held = ROWS[-2:]
    with torch.no_grad():
        ours, theirs = (m(held)[:, :-1].log_softmax(-1) for m in (done.model, model))
    assert experts.kl == pytest.approx(F.kl_div(ours, theirs, log_target=True, reduction="sum").item() / 126, rel=1e-4)
    nll = F.nll_loss(ours.flatten(0, 1), held[:, 1:].flatten()).item()
    assert experts.perplexity == pytest.approx(torch.tensor(nll).exp().item(), rel=1e-4)


def test_the_anchor_and_the_metric_earn_their_place() -> None:
    """Against the plain thing: principal axes of [keys; values] by variance alone, and a latent normed without an anchor."""
    model = make_llama()
    _, x, _ = next(layer_inputs(model, ROWS))
    x = (
        x + 2 * F.normalize(torch.randn(32, generator=torch.Generator().manual_seed(1)), dim=0) * 3
    )  # as real inputs have
    block, cfg, rank = model.layers[0], model.cfg, 16
    got = convert_attention(block, cfg, x, rank, 1, 1.0)
    latents = F.linear(x, got.kv_a_proj_with_mqa[:rank])
    spread = latents.square().mean(-1).sqrt()
    assert spread.std() / spread.mean() < 0.25
    values = F.linear(
        F.rms_norm(latents, (rank,), got.kv_a_layernorm, 1e-6), got.kv_b_proj.view(4, 16, rank)[:, 8:].flatten(0, 1)
    )
    wanted = F.linear(x, block.self_attn.v_proj.weight).view(-1, 2, 8)[:, [0, 0, 1, 1]].flatten(1)
    heads = F.linear(values - wanted, block.self_attn.o_proj.weight).square().sum()
    both = torch.cat((block.self_attn.k_proj.weight, block.self_attn.v_proj.weight))
    _, _, axes = torch.linalg.svd(F.linear(x, both), full_matrices=False)
    plain = F.rms_norm(F.linear(x, axes[:rank] @ both), (rank,))
    fitted = plain @ torch.linalg.lstsq(plain, wanted).solution
    assert heads < F.linear(fitted - wanted, block.self_attn.o_proj.weight).square().sum()


def test_experts_are_the_same_neurons_in_another_order() -> None:
    mlp = make_llama().layers[1].mlp
    x = torch.randn(600, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made = convert_experts(mlp, x, ExpertShape(shared=6, routed=6, width=8, top_k=2), seed=0)
    gates = torch.cat((made.shared_gate, *(e[:8] for e in made.gate_up)))
    assert sorted(map(tuple, gates.tolist())) == sorted(map(tuple, mlp.gate_proj.weight.tolist()))
    downs = torch.cat((made.shared_down.T, *(e.T for e in made.down)))
    assert sorted(map(tuple, downs.tolist())) == sorted(map(tuple, mlp.down_proj.weight.T.tolist()))


def test_the_neurons_that_are_dropped_are_the_weakest() -> None:
    mlp = make_llama().layers[1].mlp
    x = torch.randn(600, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        inner = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        energy = (inner.square() * mlp.down_proj.weight.square().sum(0)).mean(0)
        made = convert_experts(mlp, x, ExpertShape(shared=4, routed=6, width=8, top_k=2), seed=0)
    kept = energy.argsort(descending=True)[:80]
    gates = torch.cat((made.shared_gate, *(e[:8] for e in made.gate_up)))
    assert sorted(map(tuple, gates.tolist())) == sorted(map(tuple, mlp.gate_proj.weight[kept].tolist()))


def test_groups_find_neurons_that_fire_together_and_the_router_finds_the_groups() -> None:
    """Neurons in four planted blocks, one block active on a token: k-means and router must recover the blocks."""
    draw = torch.Generator().manual_seed(1)
    block_of = torch.arange(32) % 4
    token = torch.randint(0, 4, (800,), generator=draw)
    energy = (block_of[None] == token[:, None]) * (1 + torch.rand(800, 32, generator=draw))
    groups = balanced_groups(energy, 4, seed=0)
    assert all(len({int(block_of[n]) for n in row}) == 1 for row in groups)
    mlp = MLP(8, 40)
    directions = F.normalize(torch.randn(4, 8, generator=draw), dim=-1)
    with torch.no_grad():
        mlp.gate_proj.weight.copy_(torch.cat((4 * directions[block_of], 9 * torch.randn(8, 8, generator=draw))))
        mlp.up_proj.weight.copy_(mlp.gate_proj.weight)
        mlp.down_proj.weight.copy_(torch.ones(8, 40))
        x = 3 * directions[token] + 0.1 * torch.randn(800, 8, generator=draw)
        made = convert_experts(mlp, x, ExpertShape(shared=1, routed=4, width=8, top_k=1), seed=0)
    assert made.captured > 0.8  # chance is a quarter


def test_out_comes_a_plain_checkpoint_that_everyone_reads(
    llama_dir: Callable[..., Path], tmp_path: Path, corpus_files: list[Path]
) -> None:
    gguf_out = tmp_path / "out.gguf"
    out, cfg = tmp_path / "out", UpcycleConfig(rank=24, routed=6, top_k=3, tokens=1024, length=64, mtp=True)
    text = tmp_path / "text.txt"
    text.write_text("".join(f.read_text() for f in corpus_files[:8]))
    done = upcycle(llama_dir(tie_word_embeddings=True), out, [text], cfg, torch.float32)
    ours = load_model(out)
    with torch.no_grad():
        logits = ours(TOKENS)
        assert torch.equal(logits, done.model(TOKENS))
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert type(theirs).__name__ == "DeepseekV3ForCausalLM"
        assert torch.allclose(theirs(TOKENS).logits, logits, atol=2e-4)
    assert done.mtp_agreement is not None and len(ours.mtp) == 1
    warnings = export_gguf(Source.open(out), gguf_out, kind="f32")
    assert gguf_out.is_file() and any("multi-token" in w for w in warnings)
    tokenizer, theirs_tokenizer = Tokenizer.load(out), AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "say 42"}]
    ids = ChatTemplate.load(out).encode(tokenizer, messages, thinking=True)
    rendered = theirs_tokenizer.apply_chat_template(messages, add_generation_prompt=True, thinking=True, tokenize=False)
    assert theirs_tokenizer.encode(rendered, add_special_tokens=False) == ids
    again = upcycle(llama_dir(tie_word_embeddings=True), tmp_path / "again", [text], cfg, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(done.model.parameters(), again.model.parameters(), strict=True))


def test_the_fitted_mtp_module_beats_guessing(llama_dir: Callable[..., Path]) -> None:
    """Against the module it would be with the map it is not fitted to: the next token's embedding alone."""
    model = make_llama(seed=2)
    done = convert(source_of(model), ROWS, dataclasses.replace(EXACT, mtp=True))
    fitted = agreement(done.model, ROWS[-2:])
    assert fitted == done.mtp_agreement
    with torch.no_grad():
        done.model.mtp[0].eh_proj.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    assert fitted > agreement(done.model, ROWS[-2:])


def test_the_command_line(llama_dir: Callable[..., Path], tmp_path: Path) -> None:
    """Without --text the calibration is Python's own language reference."""
    src = llama_dir()
    args = ["--rank", "24", "--routed", "6", "--top-k", "3", "--tokens", "512", "--length", "64"]
    result = CliRunner().invoke(app, ["upcycle", str(src), str(tmp_path / "out"), *args])
    assert result.exit_code == 0, result.output
    for word in ("source", "one rotary key", "latent", "3 of 6 experts", "perplexity", "KL", "cache: 192 bytes"):
        assert word in result.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["kv_lora_rank"], config["q_lora_rank"]) == ("deepseek_v3", 24, None)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"width": 7}, "neurons"),
        ({"drop": 7, "width": 8}, "89 neurons"),
        ({"drop": 96}, "cannot be dropped"),
        ({"routed": 6, "top_k": 9}, "top_k"),
        ({"fold": 3}, "fold"),
        ({"rank": 31, "_head_dim": 4}, "rank"),
    ],
)
def test_wrong_settings_are_told_apart(changes: dict[str, int], match: str) -> None:
    model = make_llama(head_dim=changes.pop("_head_dim", 8))
    with pytest.raises(ConfigError, match=match):
        convert(source_of(model), ROWS, UpcycleConfig(**{"routed": 6, "top_k": 3, **changes}))  # type: ignore[arg-type]


@pytest.mark.parametrize("neurons", [96, 128, 688, 1536, 5632, 11008, 14336])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_the_default_shape_fits_any_source(neurons: int, kv_heads: int) -> None:
    source = dataclasses.replace(TINY, intermediate_size=neurons, num_key_value_heads=kv_heads, hidden_size=576)
    shape = expert_shape(source, UpcycleConfig())
    assert (shape.shared + shape.routed) * shape.width == neurons and 2 <= 2 * shape.top_k <= shape.routed
    assert released_config(source, UpcycleConfig(), (0, 1, 2)).kv_lora_rank <= 2 * kv_heads * 8
    if neurons == 1536:
        assert shape == ExpertShape(shared=12, routed=12, width=64, top_k=6)


def test_too_little_text_is_said(llama_dir: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(DataError, match="calibration text has"):
        upcycle(llama_dir(), tmp_path / "out", [tmp_path / "short.txt"], UpcycleConfig(routed=6, top_k=3))


def test_the_source_config_is_read_whole() -> None:
    assert LlamaConfig(**vars(TINY)) == TINY and TINY.groups == 2
