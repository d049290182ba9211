"""What `rorqual bench layer` and `bench ops` measure: true-size layers with FP8 weights, and products with them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.config import ModelConfig
from rorqual.model.batch import LayerPages
from rorqual.model.block import Block
from rorqual.model.layers import Linear, RMSNorm
from rorqual.model.moe import Gate
from rorqual.model.mtp import MTP
from rorqual.model.quantised import QuantizedExperts, QuantizedLinear, Stored, expand_absorbed, use_formats
from rorqual.ops import fp8
from rorqual.ops.fp8 import Fp8Blocks, Scheme, fp8_linear, quantize_blocks
from rorqual.ops.rope import cos_sin, inverse_frequencies

PARTS = ("dense", "moe", "mtp")
BOUNDS = {"fp32": 2e-3, "bf16": 1e-2, "dynamic": 3e-2}
"""Largest relative error of a layer's output against transformers in fp32, over tokens that choose the same experts."""


class Layer:
    """One true-size layer on a device, random FP8 weights by seed; called as a decoding step or on a whole row."""

    def __init__(self, cfg: ModelConfig, part: str, device: str, std: float = 0.02, seed: int = 0) -> None:
        self.cfg, self.part = cfg, part
        index = {"dense": 0, "moe": cfg.first_k_dense_replace, "mtp": cfg.num_hidden_layers}[part]
        with torch.device("meta"):
            module: nn.Module = (MTP if part == "mtp" else Block)(cfg, index, "loop", "sdpa")
        module.to(torch.float32)
        self.form = Fp8Blocks("weight_only")
        # eh_proj stays bf16, as released.
        use_formats(module, lambda path: None if path.endswith("eh_proj") else self.form)
        self.module = module.to_empty(device=device).eval()
        self.stored_bytes = {path: t.numel() * 2 for path, t in self.module.named_parameters()}  # timed in bf16
        self.stored_bytes |= {path: t.nbytes for path, t in self.module.named_buffers()}
        torch.manual_seed(seed)
        self._fill(std)
        speeds, self.factor = inverse_frequencies(cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rope_scaling)
        self.speeds = torch.tensor(speeds, dtype=torch.float32, device=device)

    @torch.no_grad()
    def _fill(self, std: float) -> None:
        for module in self.module.modules():
            if isinstance(module, Stored):
                codes, scale = module.weight, module.weight_scale_inv
                assert isinstance(codes, Tensor) and isinstance(scale, Tensor)
                for index in _matrices(codes):
                    drawn = torch.randn(codes[index].shape, device=codes.device) * std
                    codes[index], scale[index] = quantize_blocks(drawn)
            elif isinstance(module, RMSNorm):
                module.weight.uniform_(0.5, 1.5)
            elif isinstance(module, Gate):
                module.weight.normal_(0, std)
                module.e_score_correction_bias.normal_(0, 0.01)
            elif isinstance(module, Linear):
                module.weight.normal_(0, std)

    def use(self, dtype: torch.dtype, scheme: Scheme) -> None:
        """Plain weights in `dtype` and FP8 products by `scheme`, in place."""
        form = Fp8Blocks(scheme)
        for module in self.module.modules():
            if isinstance(module, Stored):
                module.form = form
            elif isinstance(module, RMSNorm | Linear | Gate):
                module.weight.data = module.weight.data.to(dtype)

    def absorb(self) -> None:
        """kv_b_proj plainly, as the engine keeps it on a GPU."""
        expand_absorbed(self.module, torch.bfloat16)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return cos_sin(positions, self.speeds, self.factor)

    def __call__(self, x: Tensor, positions: Tensor, cache: LayerPages | None = None) -> tuple[Tensor, Any]:
        """x [B, T, D] (for mtp [2, B, T, D]: h and the next embedding) -> the layer's output and its routing."""
        visible = None
        if cache is not None:
            keys = torch.arange(cache.page_table_BP.shape[1] * cache.pages.shape[1], device=x.device)
            visible = keys <= positions[..., None]
        inputs = (x[0], x[1]) if self.part == "mtp" else (x,)
        out, routing = self.module(*inputs, self.rope(positions), visible, cache)
        return out, routing


def _matrices(stack: Tensor) -> Iterator[tuple[int, ...]]:
    lead = stack.shape[:-2]
    return iter(
        [()]
        if not lead
        else [tuple(i) for i in torch.cartesian_prod(*map(torch.arange, lead)).view(-1, len(lead)).tolist()]
    )


# ---- agreement with transformers -------------------------------------------------------------------------------------


class Peer:
    """transformers' decoder layer in fp32 with the same weights, expanded; for mtp with the projection before it."""

    def __init__(self, layer: Layer, device: str) -> None:
        from transformers import DeepseekV3Config
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as released

        cfg = layer.cfg.replace(num_hidden_layers=layer.cfg.num_hidden_layers + 1)
        dropped = ("architectures", "model_type", "quantization_config")
        keys = {k: v for k, v in cfg.to_json().items() if k not in dropped}
        config = DeepseekV3Config(**keys)
        config._attn_implementation = config._experts_implementation = "eager"
        self.rotary = released.DeepseekV3RotaryEmbedding(config).to(device)
        index = {"dense": 0, "moe": cfg.first_k_dense_replace, "mtp": layer.cfg.num_hidden_layers}[layer.part]
        with torch.device("meta"):
            self.layer = released.DeepseekV3DecoderLayer(config, index)
        self.layer = self.layer.to_empty(device=device).eval()
        self.mtp = layer.module if isinstance(layer.module, MTP) else None
        ours = layer.module.block if isinstance(layer.module, MTP) else layer.module
        assert isinstance(ours, Block)
        self._copy(ours)

    @torch.no_grad()
    def _copy(self, ours: Block) -> None:
        targets = dict(self.layer.named_parameters()) | dict(self.layer.named_buffers())
        for path, module in ours.named_modules():
            if isinstance(module, QuantizedExperts):
                gate_up, down = targets.pop(f"{path}.gate_up_proj"), targets.pop(f"{path}.down_proj")
                for e in range(down.shape[0]):
                    for stored, target in ((module.gate_up, gate_up), (module.down, down)):
                        one = stored.form.dense({k: v[e] for k, v in stored.parts.items()}, torch.float32)
                        target[e].copy_(one.reshape(target[e].shape))
            elif isinstance(module, QuantizedLinear):
                targets.pop(f"{path}.weight").copy_(module.dense(torch.float32))
            elif isinstance(module, Gate):
                targets.pop(f"{path}.weight").copy_(module.weight)
                targets.pop(f"{path}.e_score_correction_bias").copy_(module.e_score_correction_bias)
            elif isinstance(module, RMSNorm):
                targets.pop(f"{path}.weight").copy_(module.weight)
        assert not targets, f"transformers has {list(targets)}, which was not given a value"

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """x [1, T, D] (for mtp [2, 1, T, D]) in fp32, causal."""
        if self.mtp is not None:

            def norm(v: Tensor, module: RMSNorm) -> Tensor:
                return F.rms_norm(v, v.shape[-1:], module.weight.float(), module.eps)

            both = torch.cat((norm(x[1], self.mtp.enorm), norm(x[0], self.mtp.hnorm)), -1)
            x = F.linear(both, self.mtp.eh_proj.weight.float())
        positions = torch.arange(x.shape[1], device=x.device)[None]
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf"), device=x.device).triu(1)[None, None]
        out = self.layer(x, attention_mask=mask, position_ids=positions, position_embeddings=self.rotary(x, positions))
        out = out[0] if isinstance(out, tuple) else out
        return out if self.mtp is None else norm(out, self.mtp.shared_head.norm)


@torch.inference_mode()
def agreement(cfg: ModelConfig, part: str, device: str, std: float, tokens: int = 64) -> list[dict[str, Any]]:
    """Relative errors of our layer in three arithmetics against transformers in fp32, the same weights and input.

    The weights' standard deviation `std` decides how much of the output is the residual, which no arithmetic rounds:
    0.006 is the paper's initialisation (section 4.2), at 0.02 the layer's own output outweighs it.
    """
    layer = Layer(cfg, part, device, std)
    layer.use(torch.bfloat16, "weight_only")  # plain weights are what bf16 holds, for every side
    layer.use(torch.float32, "weight_only")
    peer = Peer(layer, device)
    shape = (2, 1, tokens, cfg.hidden_size) if part == "mtp" else (1, tokens, cfg.hidden_size)
    x = torch.randn(shape, device=device).bfloat16().float()
    want = peer(x)
    del peer
    positions = torch.arange(tokens, device=device)[None]
    _, reference = layer(x, positions)
    rows = []
    for name, dtype, scheme in (
        ("fp32", torch.float32, "weight_only"), ("bf16", torch.bfloat16, "weight_only"),
        ("dynamic", torch.bfloat16, "dynamic"),
    ):  # fmt: skip
        layer.use(dtype, scheme)  # type: ignore[arg-type]
        out, routing = layer(x.to(dtype), positions)
        same = torch.ones(tokens, dtype=torch.bool, device=device)
        if routing is not None:
            same = (routing.chosen_NK.sort(-1).values == reference.chosen_NK.sort(-1).values).all(-1)
        base = x if part != "mtp" else torch.zeros_like(want)
        rows.append(
            {
                "part": part, "std": std, "arithmetic": name, "bound": BOUNDS[name],
                "error": _relative(out[0, same].float(), want[0, same]),
                "error_all_tokens": _relative(out[0].float(), want[0]),
                "error_without_residual": _relative((out - base)[0, same].float(), (want - base)[0, same]),
                "same_experts": same.float().mean().item(),
            }
        )  # fmt: skip
    return rows


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# ---- time ------------------------------------------------------------------------------------------------------------


def decode_step(layer: Layer, batch: int, context: int, device: str) -> Callable[[], tuple[Tensor, Any]]:
    """One decoding step of the layer for `batch` sequences that each have `context` tokens in the cache, fresh inputs."""
    cfg, page = layer.cfg, 64
    per = -(-(context + 1) // page)
    pages = torch.randn(1 + batch * per, page, cfg.cache_dim, device=device, dtype=torch.bfloat16)
    table = torch.arange(1, 1 + batch * per, device=device).view(batch, per)
    slots = table[:, context // page, None] * page + context % page
    cache = LayerPages(pages, table, slots, torch.full((batch,), context + 1, device=device))
    positions = torch.full((batch, 1), context, device=device)
    shape = (2, batch, 1, cfg.hidden_size) if layer.part == "mtp" else (batch, 1, cfg.hidden_size)
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    return lambda: layer(x, positions, cache)


def step_bytes(layer: Layer, batch: int, context: int, routing: Any) -> int:
    """Bytes a decoding step must move: every weight it uses once (of the experts, those it chose), and the cache."""
    cfg, total = layer.cfg, 0.0
    distinct = 0.0 if routing is None else routing.chosen_NK.unique().numel() / cfg.n_routed_experts
    for path, nbytes in layer.stored_bytes.items():
        total += nbytes * (distinct if ".experts." in f".{path}" else 1.0)
    return int(total + batch * (context + 1) * cfg.cache_dim * 2)


def step_flops(layer: Layer, batch: int, context: int) -> int:
    """Two for each weight a token uses, and the absorbed attention."""
    cfg = layer.cfg
    active = 0.0
    for path, tensor in (*layer.module.named_parameters(), *layer.module.named_buffers()):
        share = cfg.num_experts_per_tok / cfg.n_routed_experts if ".experts." in f".{path}" else 1.0
        active += tensor.numel() * share if not path.endswith("scale_inv") else 0
    attention = 2 * cfg.num_attention_heads * (2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim) * context
    return int(batch * (2 * active + attention))


def timed(work: Callable[[], Any], rounds: int = 20) -> float:
    """Median seconds of a replayed CUDA graph of `work`, or of plain calls elsewhere."""
    if not torch.cuda.is_available():
        import time

        def once() -> float:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start

        return statistics.median(once() for _ in range(3))
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    flush = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")  # the next round reads weights from memory
    seconds = []
    for _ in range(rounds):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    return statistics.median(seconds)


def copy_bandwidth(device: str, size: int = 1 << 30) -> float:
    """Bytes a second, read plus written, of a large copy: the best of the library's copy and an elementwise product."""
    a = torch.ones((size if device.startswith("cuda") else size // 8) // 4, device=device)
    b = torch.empty_like(a)
    seconds = min(timed(lambda: b.copy_(a)), timed(lambda: torch.mul(a, 2.0, out=b)))
    return 2 * a.nbytes / seconds


def attention(device: str, heads: list[int], batches: list[int], context: int) -> list[dict[str, Any]]:
    """The paged kernels at the released latent's size, every row `context` tokens long."""
    from rorqual.ops.attention import attend_pages
    from rorqual.ops.triton.mla import Tiles, busy_split, decode, tiles, wide_missing

    C, R, page = 512, 64, 64
    width, bandwidth, out = -(-context // page), copy_bandwidth(device), []
    for batch in batches:
        pages = torch.randn(batch * width, page, C + R, device=device, dtype=torch.bfloat16)
        table = torch.randperm(batch * width, device=device).view(batch, width)
        lengths = torch.full((batch,), context, device=device)
        for H in heads:
            q = torch.randn(batch, H, C + R, device=device, dtype=torch.bfloat16)
            split = busy_split(batch, H, width * page)
            want = attend_pages(q[:1], pages, table[:1], lengths[:1], C, (C + R) ** -0.5, "reference").float()
            hows: list[Tiles | Literal["wide"]] = [tiles(H, q.dtype)]
            if wide_missing(q, pages, C) is None:
                hows.append("wide")
            for how in hows:
                run = partial(decode, q, pages, table, lengths, C, (C + R) ** -0.5, split=split, how=how)
                error, seconds = float((run()[:1].float() - want).norm() / want.norm()), timed(run)
                rate = batch * context * (C + R) * pages.itemsize / seconds
                out.append({
                    "heads": H, "batch": batch, "kernel": how if how == "wide" else "tiles", "split": split,
                    "microseconds": 1e6 * seconds,
                    "tflops": 2 * batch * context * H * (2 * C + R) / seconds / 1e12, "gigabytes_per_s": rate / 1e9,
                    "of_bandwidth": rate / bandwidth, "error": error,
                })  # fmt: skip
    return out


def products(cfg: ModelConfig, device: str, rows: list[int]) -> list[dict[str, Any]]:
    """Every way of multiplying by an FP8 weight, by shape: microseconds, and the error against fp64 arithmetic."""
    D, H = cfg.hidden_size, cfg.num_attention_heads
    shapes = {
        "kv_a_proj_with_mqa": (cfg.cache_dim, D), "o_proj": (D, H * cfg.v_head_dim),
        "gate_proj": (cfg.intermediate_size, D), "shared down_proj": (D, cfg.moe_intermediate_size),
    }  # fmt: skip
    out = []
    for name, (n, k) in shapes.items():
        weight = torch.randn(n, k, device=device) * 0.02
        codes, scale = quantize_blocks(weight)
        plain = fp8.dequantize_blocks(codes, scale, torch.bfloat16)
        for m in rows:
            x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
            row: dict[str, Any] = {"weight": name, "rows": m, "out": n, "in": k}
            row["bf16 product"] = timed(partial(F.linear, x, plain)) * 1e6
            exact = F.linear(x.double(), fp8.dequantize_blocks(codes, scale).double())
            for scheme, table in (("weight_only", fp8.weight_only_backends), ("dynamic", fp8.dynamic_backends)):
                for backend in table.names():
                    if scheme == "dynamic" and backend == "reference":
                        continue

                    work = partial(fp8_linear, x, codes, scale, scheme, backend)  # type: ignore[arg-type]

                    row[f"{scheme} {backend}"] = timed(work) * 1e6
                    row[f"{scheme} {backend} error"] = _relative(work().double(), exact)
            out.append(row)
    return out
