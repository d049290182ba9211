"""The two forms of attention, the cache, and MTP, against one another and against independent computations."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from rorqual.config import ModelConfig
from rorqual.model.batch import Batch, LatentPages
from rorqual.model.transformer import Transformer
from rorqual.ops.attention import attend_pages
from rorqual.ops.rope import cos_sin
from tests.parity import build, draw

PAGE = 8


def empty_cache(model: Transformer, rows: int, tokens: int) -> LatentPages:
    """Pages for each row, shuffled so that order in memory is not order in the text; page 0 is scrap."""
    pages = -(-tokens // PAGE)
    layers = model.cfg.num_hidden_layers + model.cfg.num_nextn_predict_layers
    latents = torch.full((layers, 1 + rows * pages, PAGE, model.cfg.cache_dim), float("nan"))
    table = 1 + torch.randperm(rows * pages).view(rows, pages)
    # Unwritten places must not matter, but NaN times a zero probability would: real pages start finite.
    return LatentPages(latents.nan_to_num(7.0), table, torch.zeros(rows, 0, dtype=torch.int64))


def at(cache: LatentPages, start: int, count: int) -> Batch:
    positions = torch.arange(start, start + count).expand(cache.page_table_BP.shape[0], -1)
    slots = cache.page_table_BP.gather(1, positions // PAGE) * PAGE + positions % PAGE
    return Batch(positions_BT=positions, cache=LatentPages(cache.latents, cache.page_table_BP, slots))


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward_at_every_position(seed: int) -> None:
    model = build(draw(seed), seed)
    tokens = torch.randint(0, model.cfg.vocab_size, (3, 45))
    full = model(tokens)
    cache = empty_cache(model, 3, 45)
    steps = [model(tokens[:, :19], at(cache, 0, 19))]
    steps += [model(tokens[:, i : i + 1], at(cache, i, 1)) for i in range(19, 45)]
    assert (torch.cat(steps, 1) - full).abs().max() < 1e-4


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_a_row_alone_equals_the_row_in_a_batch(seed: int) -> None:
    model = build(draw(seed), seed)
    tokens = torch.randint(0, model.cfg.vocab_size, (4, 30))
    together = model(tokens)
    for row in range(4):
        assert (model(tokens[row : row + 1]) - together[row]).abs().max() < 1e-4


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_absorbed_equals_expanded_attention(seed: int) -> None:
    model = build(draw(seed), seed)
    mla = model.layers[0].self_attn
    x = torch.randn(2, 21, model.cfg.hidden_size)
    rope = cos_sin(torch.arange(21)[None], model.rope_speeds, model.rope_factor)
    q, latents = mla.queries(x, rope), mla.latents(x, rope)
    visible = torch.ones(21, 21, dtype=torch.bool).tril().expand(2, -1, -1)
    assert (mla.absorbed(q, latents, visible) - mla.expanded(q, latents, visible)).abs().max() < 1e-4
    assert (mla.expanded(q, latents, None) - mla.expanded(q, latents, visible)).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("context_chunk", [4096, 48])
def test_long_chunks_over_a_cache_expand_and_short_ones_absorb(
    context_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rorqual.model.mla.CONTEXT_CHUNK", context_chunk)
    """Both branches of the layer's own choice give the full forward's result."""
    cfg = ModelConfig.load("test")
    model = build(cfg, 1)
    tokens = torch.randint(0, cfg.vocab_size, (1, 120))
    full, cache = model(tokens), empty_cache(model, 1, 120)
    chunks = [model(tokens[:, a:b], at(cache, a, b - a)) for a, b in [(0, 50), (50, 53), (53, 120)]]
    assert (torch.cat(chunks, 1) - full).abs().max() < 1e-4


@torch.no_grad()
def test_documents_in_a_row_do_not_see_each_other_when_masked() -> None:
    model = build(ModelConfig.load("test"), 0)
    a, b = torch.randint(0, 256, (1, 13)), torch.randint(0, 256, (1, 17))
    documents = torch.tensor([[1] * 13 + [2] * 17])
    packed = model(torch.cat((a, b), 1), Batch(documents_BT=documents))
    assert (packed[:, :13] - model(a)).abs().max() < 1e-5
    # The second stands at positions 13..29, which only relative distances see.
    assert (packed[:, 13:] - model(b)).abs().max() < 1e-4


@torch.no_grad()
def test_mtp_follows_the_released_wiring() -> None:
    """Recomputed by hand: eh_proj over [enorm(Emb(t+1)), hnorm(h)], embedding first, h after the final norm."""
    cfg = ModelConfig.load("test").replace(num_nextn_predict_layers=2)
    model = build(cfg, 3)
    tokens = torch.randint(0, cfg.vocab_size, (2, 12))
    h, _ = model.hidden(tokens[:, :10])
    hs, _ = model.predict_further(h, [tokens[:, 1:11], tokens[:, 2:12]])
    rope = cos_sin(torch.arange(10)[None], model.rope_speeds, model.rope_factor)
    for module, later, ours in zip(model.mtp, (tokens[:, 1:11], tokens[:, 2:12]), hs, strict=True):
        embedding = model.embed_tokens.weight[later]

        def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return x / (x.pow(2).mean(-1, keepdim=True) + cfg.rms_norm_eps).sqrt() * weight

        first = norm(embedding, module.enorm.weight) @ module.eh_proj.weight[:, : cfg.hidden_size].T
        second = norm(h, module.hnorm.weight) @ module.eh_proj.weight[:, cfg.hidden_size :].T
        x, _ = module.block(first + second, rope)
        h = norm(x, module.shared_head.norm.weight)
        assert (ours - h).abs().max() < 1e-4


@torch.no_grad()
def test_mtp_over_the_cache_equals_mtp_without() -> None:
    cfg = ModelConfig.load("test")
    model = build(cfg, 5)
    tokens = torch.randint(0, cfg.vocab_size, (2, 21))
    h, _ = model.hidden(tokens[:, :20])
    whole = model.predict_further(h, [tokens[:, 1:]])[0][0]
    cache = empty_cache(model, 2, 20)
    parts = []
    for a, b in [(0, 9), (9, 10), (10, 20)]:
        batch = at(cache, a, b - a)
        h_part, _ = model.hidden(tokens[:, a:b], batch)
        parts.append(model.predict_further(h_part, [tokens[:, a + 1 : b + 1]], batch)[0][0])
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-4


def test_two_dtypes_live_side_by_side() -> None:
    cfg = ModelConfig.load("test")
    a, b = Transformer(cfg, dtype=torch.bfloat16), Transformer(cfg)
    tokens = torch.randint(0, 256, (1, 9))
    assert a(tokens).dtype == torch.bfloat16 and b(tokens).dtype == torch.float32
    biases = [x for n, x in a.named_buffers() if n.endswith("e_score_correction_bias")]
    assert biases and all(x.dtype == torch.float32 for x in biases)


def test_initialisation_is_the_papers() -> None:
    torch.manual_seed(0)
    cfg = ModelConfig.load("test").replace(initializer_range=0.006)
    for name, parameter in Transformer(cfg).named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif parameter.numel() > 500:
            assert abs(parameter.std().item() - 0.006) < 0.001 and abs(parameter.mean().item()) < 0.001, name


@pytest.mark.parametrize("fused", [False, True])
@torch.inference_mode()
def test_decoding_over_pages_where_they_lie_equals_the_gathered_form(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does with one new token a row, here with the plain operations and with the kernels interpreted."""
    if fused and not torch.cuda.is_available():
        pytest.importorskip("triton")
        for module in ("model.mla", "model.moe", "ops.rms_norm", "ops.router"):
            monkeypatch.setattr(f"rorqual.{module}.fuses", lambda x: True)
        monkeypatch.setattr("rorqual.model.mla.attend_pages", partial(attend_pages, backend="triton"))
    cfg = ModelConfig.load("test")
    model = build(cfg, 1)
    latents = torch.randn(cfg.num_hidden_layers, 8, 64, cfg.cache_dim)
    table, positions = torch.tensor([[1, 2], [3, 0], [4, 5]]), torch.tensor([70, 10, 127])
    slots = table.gather(1, (positions // 64)[:, None]) * 64 + positions[:, None] % 64
    tokens = torch.randint(0, cfg.vocab_size, (3, 1))
    gathered, lying = latents.clone(), latents.clone()
    want = model.hidden(tokens, Batch(positions[:, None], cache=LatentPages(gathered, table, slots)))[0]
    h = model.hidden(tokens, Batch(positions[:, None], cache=LatentPages(lying, table, slots, positions + 1)))[0]
    assert torch.allclose(h, want, atol=1e-5) and torch.allclose(lying, gathered, atol=1e-5)
