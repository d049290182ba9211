"""The packed model against the torch model it was made of: shapes drawn at random, every way of storing weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rorqual.checkpoint import load_model, save_model
from rorqual.checkpoint.convert import convert
from rorqual.config import ModelConfig
from rorqual.engine.native import NativeModel, StepTokens, unsupported
from rorqual.errors import BackendUnavailable
from rorqual.model.batch import Batch, LatentPages
from rorqual.model.layers import Linear
from rorqual.model.transformer import Transformer
from rorqual.ops.formats import Parts
from rorqual.ops.native import build
from rorqual.ops.native.pack import quantise_rows
from rorqual.ops.packed import PackedIntegers

if build.compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

BASE = ModelConfig.load("test")
BOUND = 1e-5
"""Largest relative error (Frobenius) of hidden states in fp32."""

SHAPES = {
    "as it is": {},
    "no query rank": {"q_lora_rank": None},
    "groups": {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "odd widths": {"moe_intermediate_size": 40, "intermediate_size": 72, "v_head_dim": 20, "qk_nope_head_dim": 12},
    "many heads": {"num_attention_heads": 20, "num_hidden_layers": 2},
    "yarn": {
        "rope_scaling": {
            "type": "yarn", "factor": 8, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
            "mscale": 1.0, "mscale_all_dim": 1.0,
        }
    },
    "untied, gates as they are": {"tie_word_embeddings": False, "norm_topk_prob": False, "num_nextn_predict_layers": 0},
    "dense": {"first_k_dense_replace": 3, "num_hidden_layers": 3, "num_nextn_predict_layers": 0},
}  # fmt: skip


def drawn(seed: int = 0, **changes: object) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(replace(BASE, **changes))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("norm.weight", "correction_bias")):
            tensor.data.add_(torch.randn_like(tensor) * 0.1)
        elif "rope" not in name:
            tensor.data.mul_(3)
    return model


class Sequence:
    """Pages for some rows, and steps over them."""

    def __init__(self, model: NativeModel, rows: int = 1, pages: int = 6) -> None:
        self.model = model
        self.table = np.random.default_rng(0).permutation(rows * pages).reshape(rows, pages).astype(np.int32) + 1
        layers = model.cfg.num_hidden_layers + len(model.mtp)
        self.latents = torch.zeros(layers, rows * pages + 1, 64, model.row_width)

    def tokens(self, ids: torch.Tensor, spans: list[tuple[int, int, int]]) -> StepTokens:
        """(row, start, end) of each."""
        return StepTokens([(ids[r, a:b].tolist(), a, self.table[r].tolist()) for r, a, b in spans])

    def run(self, ids: torch.Tensor, spans: list[tuple[int, int, int]]) -> torch.Tensor:
        return self.model.forward(self.tokens(ids, spans), self.latents)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_it_computes_what_the_torch_model_computes(name: str) -> None:
    model = drawn(**SHAPES[name])
    ids = torch.randint(0, model.cfg.vocab_size, (1, 150))
    want = model.hidden(ids)[0]
    logits = model.head(want)[0]
    further = model.predict_further(want[:, :-1], [ids[:, 1:]])[0] if len(model.mtp) else []
    native = NativeModel(model, kind=None, max_positions=256, threads=2)
    sequence = Sequence(native)
    h = sequence.run(ids, [(0, 0, 150)])
    assert error(h, want[0]) < BOUND
    assert error(native.logits(h), logits) < BOUND
    for wanted in further[:1]:
        tokens = sequence.tokens(ids[:, 1:], [(0, 0, 149)])
        out = native.predict(0, tokens, h[:-1].contiguous(), sequence.latents)
        assert error(out, wanted[0]) < BOUND


@torch.inference_mode()
def test_absorbed_attention_over_pages_agrees_with_the_paged_torch_path() -> None:
    model = drawn()
    ids = torch.randint(0, model.cfg.vocab_size, (1, 200))
    cache = LatentPages(
        torch.zeros(model.cfg.num_hidden_layers, 5, 64, model.cfg.cache_dim),
        torch.arange(1, 5)[None],
        torch.arange(64, 264)[None],
    )
    want = model.hidden(ids, Batch(torch.arange(200)[None], cache=cache))[0]
    h = Sequence(NativeModel(model, kind=None, max_positions=256)).run(ids, [(0, 0, 200)])
    assert error(h, want[0]) < BOUND


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("to", ["bf16", "fp8", "int8", "int4"])
@torch.inference_mode()
def test_stored_formats(to: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A converted checkpoint, packed as it is stored, against torch over the same weights. Integer weights round the
    activations to eight bits, and W_UK and W_UV to bf16; the reference is made to do the same. Still a difference in the
    last bit can turn a rounding, and one turned rounding turns others, at worst a router's choice: so one layer, bounds
    for every row but a few, and several draws."""
    width = {"moe_intermediate_size": 64, "intermediate_size": 160, "hidden_size": 96, "q_lora_rank": 64}
    if to.startswith("int"):
        width |= {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    save_model(drawn(seed, **width), tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / to, to=to)
    reference = load_model(tmp_path / to, dtype="float32")
    if to.startswith("int"):
        for block in (*reference.layers, *(m.block for m in reference.mtp)):
            kv_b = block.self_attn.kv_b_proj
            plain = Linear(*reversed(kv_b.stored.shape))
            plain.weight.data = kv_b.dense(torch.bfloat16).float()
            block.self_attn.kv_b_proj = plain

        def rounding(form: PackedIntegers, x: torch.Tensor, parts: Parts) -> torch.Tensor:
            return F.linear(quantise_rows(x).float(), form.dense(parts, torch.float32))

        monkeypatch.setattr(PackedIntegers, "linear", rounding)
    ids = torch.randint(0, reference.cfg.vocab_size, (1, 70))
    want = reference.hidden(ids)[0]
    native = NativeModel(load_model(tmp_path / to), kind=None, max_positions=256)
    h = Sequence(native).run(ids, [(0, 0, 70)])
    assert native.name == {"bf16": "bfloat16"}.get(to, to)
    rows = ((h - want[0]).norm(dim=-1) / want[0].norm(dim=-1)).sort().values
    assert rows[len(rows) // 10] < 1e-4, "rows before the first turned rounding agree"
    if not to.startswith("int"):
        assert rows[-1] < 2e-5
    assert rows[-1 - len(rows) // 20] < 0.05
    if (to, seed) == ("int8", 0):  # where no choice turns
        assert error(h, want[0]) < 0.05


@torch.inference_mode()
def test_the_same_bits_in_any_batch_chunking_and_number_of_threads() -> None:
    model = drawn()
    ids = torch.randint(0, model.cfg.vocab_size, (3, 300))
    for kind in ("float32", "int8"):
        native = NativeModel(drawn(), kind=kind, max_positions=512)
        whole = [Sequence(native, 3).run(ids, [(r, 0, 300)]) for r in range(3)]
        native.set_threads(3)
        sequence = Sequence(native, 3)
        rng = np.random.default_rng(0)
        done = [0, 0, 0]
        while min(done) < 300:
            spans = [(r, done[r], min(300, done[r] + int(rng.choice([1, 2, 5, 17, 64, 120])))) for r in range(3)]
            spans = [s for s in spans if s[1] < s[2]]
            spans = [spans[i] for i in rng.permutation(len(spans))]
            h = sequence.run(ids, spans)
            for (r, a, b), part in zip(spans, h.split([b - a for _, a, b in spans]), strict=True):
                assert torch.equal(part, whole[r][a:b]), (kind, r, a, b)
                done[r] = b


@torch.inference_mode()
def test_a_fault_stays_with_its_row() -> None:
    native = NativeModel(drawn(), kind=None, max_positions=128)
    sequence = Sequence(native, 2)
    ids = torch.randint(0, native.cfg.vocab_size, (2, 20))
    clean = sequence.run(ids, [(0, 0, 20), (1, 0, 20)])
    sequence.latents[1, sequence.table[1, 0], 3] = float("nan")
    h = sequence.run(ids, [(0, 10, 20), (1, 10, 20)])
    assert torch.equal(h[:10], clean[10:20]) and not h[10:].isfinite().any()


@torch.inference_mode()
def test_loads_count_tokens_by_expert() -> None:
    model = drawn()
    ids = torch.randint(0, model.cfg.vocab_size, (1, 40))
    chosen = [r.chosen_NK for r in model.hidden(ids)[1]]
    native = NativeModel(model, kind=None, max_positions=64)
    sequence = Sequence(native)
    cfg = native.cfg
    loads = np.zeros((cfg.num_hidden_layers, cfg.n_routed_experts + 1), np.int64)
    native.forward(sequence.tokens(ids, [(0, 0, 40)]), sequence.latents, loads)
    for layer, picks in zip(range(cfg.first_k_dense_replace, cfg.num_hidden_layers), chosen, strict=True):
        counts = torch.bincount(picks.flatten(), minlength=cfg.n_routed_experts)
        assert loads[layer, :-1].tolist() == counts.tolist() and loads[layer, -1] == (counts > 0).sum()


def test_what_it_cannot_take_is_refused() -> None:
    model = drawn(kv_lora_rank=24)
    assert unsupported(model.cfg)
    with pytest.raises(BackendUnavailable, match="kv_lora_rank"):
        NativeModel(model, kind=None, max_positions=64)
