"""The small operations of a training step with gradients, by `ops.triton.training` and `ops.triton.routing`: what eager
PyTorch would spend a dozen passes over memory on. Each computes what its reference does, roundings of the forward included
(`ops.rms_norm`, `ops.rope`, `ops.router`, `ops.balance`, `model.mla.MLA.latent`); gradients are in fp32 until they are
stored. `ops.fused.trains` says when they may stand in; under torch.compile they do not, because a compiler fuses by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Grads = tuple[Tensor | None, ...]


def product32(a: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
    """a b with the sums left in fp32, whatever 16-bit dtype a and b are of. onto: fp32, they are added to it in place."""
    if a.is_cuda and a.dtype != torch.float32:
        if onto is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(onto, a, b, out_dtype=torch.float32, out=onto)
    return torch.mm(a.float(), b.float()) if onto is None else onto.addmm_(a.float(), b.float())


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        from rorqual.ops.triton.fused import rms_norm

        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        from rorqual.ops.triton.training import norm_backward

        x, weight = ctx.saved_tensors
        width = x.shape[-1]
        dx, dw = norm_backward(x.reshape(-1, width), weight, ctx.eps, grads[0].reshape(-1, width))
        return dx.view(x.shape), dw.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm.rms_norm`."""
    return _Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]


class _NormBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        from rorqual.ops.triton.fused import rms_norm

        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return x.view_as(x), rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        from rorqual.ops.triton.training import norm_backward

        x, weight = ctx.saved_tensors
        beside, dout = grads
        if dout is None:
            return beside, None, None
        rows = x.flatten(0, -2)
        add = None if beside is None else beside.reshape(rows.shape).contiguous()
        dx, dw = norm_backward(rows, weight, ctx.eps, dout.reshape(rows.shape), add)
        return dx.view(x.shape), dw.to(weight.dtype), None


def norm_beside(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x itself, and its norm: the gradient that comes for x directly is added in the norm's own backward."""
    return _NormBeside.apply(x, weight, eps)  # type: ignore[no-untyped-call]


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        from rorqual.ops.triton.decode import add_norm

        ctx.set_materialize_grads(False)
        total, out = add_norm(x.flatten(0, -2), y.flatten(0, -2), weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        return total.view_as(x), out.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        from rorqual.ops.triton.training import norm_backward

        total, weight = ctx.saved_tensors
        dtotal, dout = grads
        if dout is None:
            return dtotal, dtotal, None, None
        add = None if dtotal is None else dtotal.reshape(total.shape).contiguous()
        dx, dw = norm_backward(total, weight, ctx.eps, dout.reshape(total.shape), add)
        dx = dx.view(dout.shape)
        return dx, dx, dw.to(weight.dtype), None


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and its norm. The gradient that comes for x + y directly is added in the norm's own backward."""
    return _AddNorm.apply(x, y, weight, eps)  # type: ignore[no-untyped-call]


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, w) for w in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        x, *weights = ctx.saved_tensors
        rows, dys = x.flatten(0, -2), [g.reshape(-1, g.shape[-1]) for g in grads]
        dx = dys[0] @ weights[0]
        for dy, w in zip(dys[1:], weights[1:], strict=True):
            dx.addmm_(dy, w)
        needed = ctx.needs_input_grad[1:]
        return dx.view(x.shape), *(dy.T @ rows if n else None for dy, n in zip(dys, needed, strict=True))


def products(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """x W^T for several weights, cast to x's dtype; the gradients of x are added by the products that make them."""
    return _Products.apply(x, *(w.to(x.dtype) for w in weights))  # type: ignore[no-untyped-call]


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        from rorqual.ops.triton.fused import swiglu

        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        from rorqual.ops.triton.training import swiglu_backward

        gate, up = ctx.saved_tensors
        width = gate.shape[-1]
        dgate, dup = swiglu_backward(*(t.reshape(-1, width) for t in (gate, up, grads[0])))
        return dgate.view(gate.shape), dup.view(up.shape)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return _Swiglu.apply(gate, up)  # type: ignore[no-untyped-call]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTX: Tensor, cos_TR: Tensor, sin_TR: Tensor, heads: int) -> Tensor:
        from rorqual.ops.triton.training import rotate_queries_

        rotate_queries_(q_BTX.flatten(0, 1), cos_TR, sin_TR, heads, False)
        ctx.save_for_backward(cos_TR, sin_TR)
        ctx.heads = heads
        return q_BTX.view_as(q_BTX)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        from rorqual.ops.triton.training import rotate_queries_

        cos, sin = ctx.saved_tensors
        dq = grads[0].contiguous()
        rotate_queries_(dq.flatten(0, 1), cos, sin, ctx.heads, True)
        return dq, None, None, None


def rotate_queries_(q_BTX: Tensor, cos_TR: Tensor, sin_TR: Tensor, heads: int) -> Tensor:
    """The rotary part of each head of q [B, T, H * (N + R)], contiguous, turned by the angle of its place in the row, in
    place: nobody else may need q (a product's backward needs what it multiplied, not what came out), nor its gradient,
    which attention alone makes and which is turned back in place too. A third of the bytes of a turned copy."""
    return _Rotate.apply(q_BTX, cos_TR, sin_TR, heads)  # type: ignore[no-untyped-call]


class _Latent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kv_NX: Tensor, weight_C: Tensor, eps: float, cos_TR: Tensor, sin_TR: Tensor
    ) -> tuple[Tensor, Tensor]:
        from rorqual.ops.triton.training import latent

        kv_NX = kv_NX.contiguous()
        ctx.save_for_backward(kv_NX, weight_C, cos_TR, sin_TR)
        ctx.eps = eps
        return latent(kv_NX, weight_C, eps, cos_TR, sin_TR)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        from rorqual.ops.triton.training import latent_backward

        kv, weight, cos, sin = ctx.saved_tensors
        dkv, dw = latent_backward(kv, weight, ctx.eps, cos, sin, *(g.contiguous() for g in grads))
        return dkv, dw.to(weight.dtype), None, None, None


def latent(kv_NX: Tensor, weight_C: Tensor, eps: float, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor]:
    """The normed latent [N, C] and the rotated shared key [N, R] from their projection; row n stands at place n % T."""
    return _Latent.apply(kv_NX, weight_C, eps, cos_TR, sin_TR)  # type: ignore[no-untyped-call]


class _KeysValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kv_SHX: Tensor, k_rope_SR: Tensor, nope: int) -> tuple[Tensor, Tensor]:
        from rorqual.ops.triton.fused import expanded_keys

        ctx.nope = nope
        return expanded_keys(kv_SHX, k_rope_SR, nope), kv_SHX[..., nope:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        from rorqual.ops.triton.training import keys_backward

        dk, dv = (g if g.stride(-1) == 1 else g.contiguous() for g in grads)
        return *keys_backward(dk, dv, ctx.nope), None


def keys_values(kv_SHX: Tensor, k_rope_SR: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    """Every head's key [S, H, N + R] and value [S, H, U] (a view) from kv [S, H, N + U] and the shared rotary key."""
    return _KeysValues.apply(kv_SHX, k_rope_SR, nope)  # type: ignore[no-untyped-call]


# ---- routing ---------------------------------------------------------------------------------------------------------


def _split(x: Tensor, parts: int) -> list[Tensor]:
    """fp32 as a sum of bf16 numbers: three hold all of its 24 bits."""
    out = []
    for _ in range(parts):
        out.append(x.to(torch.bfloat16))
        x = x - out[-1].float()
    return out


class _GateLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight_ED)
        return product32(x_ND, torch.cat(_split(weight_ED, 3)).T).unflatten(1, (3, -1)).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        x, weight = ctx.saved_tensors
        (d1, d2), (w1, w2) = _split(grads[0], 2), _split(weight, 2)
        dx = torch.cat((d1, d1, d2), 1) @ torch.cat((w1, w2, w1))
        dw = product32(torch.cat((d1, d2), 1).T, x).unflatten(0, (2, -1)).sum(0)
        return dx, dw


def gate_logits(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    """x W^T of bf16 activations and an fp32 weight as in fp32, on bf16 matrix units: the weight is three bf16 numbers, whose
    products with x are exact, added in fp32. Gradients keep 16 bits of either factor, more than the bf16 result of dx."""
    return _GateLogits.apply(x_ND, weight_ED)  # type: ignore[no-untyped-call]


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NE: Tensor,
        bias_E: Tensor,
        top_k: int,
        n_group: int,
        topk_group: int,
        normalise: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from rorqual.ops.triton.fused import route

        gates, chosen, scores = route(logits_NE, bias_E, top_k, n_group, topk_group, normalise, scale)
        ctx.save_for_backward(gates, chosen, scores)
        ctx.mark_non_differentiable(chosen)
        ctx.set_materialize_grads(False)
        ctx.how = normalise, scale
        return gates, chosen, scores

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        from rorqual.ops.triton.routing import route_backward

        gates, chosen, scores = ctx.saved_tensors
        dgates, _, dscores = (None if g is None else g.contiguous() for g in grads)
        dgates = torch.zeros_like(gates) if dgates is None else dgates
        return route_backward(scores, gates, chosen, dgates, dscores, *ctx.how), *(None,) * 6


def route(
    logits_NE: Tensor, bias_E: Tensor, top_k: int, n_group: int, topk_group: int, normalise: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.router.route`. Of equal affinities the lower expert is chosen; choices come in falling order."""
    return _Route.apply(logits_NE, bias_E, top_k, n_group, topk_group, normalise, scale)  # type: ignore[no-untyped-call]


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores_NE: Tensor, T: int, top_k: int) -> Tensor:
        from rorqual.ops.triton.routing import balance_parts

        counts, P_BE = balance_parts(scores_NE, T, top_k)
        f_BE = counts.float() * (scores_NE.shape[1] / top_k / T)
        ctx.save_for_backward(scores_NE, f_BE)
        ctx.T = T
        return (f_BE * P_BE).sum(-1).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        from rorqual.ops.triton.routing import balance_backward

        scores, f_BE = ctx.saved_tensors
        return balance_backward(scores, f_BE * (grads[0] / (len(f_BE) * ctx.T)), ctx.T), None, None


def sequence_balance_loss(scores_NE: Tensor, T: int, top_k: int) -> Tensor:
    """`ops.balance.sequence_balance_loss`."""
    return _Balance.apply(scores_NE, T, top_k)  # type: ignore[no-untyped-call]


# ---- routed experts --------------------------------------------------------------------------------------------------


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, gates_NK: Tensor, chosen_NK: Tensor,
        add_ND: Tensor | None, more_ND: Tensor | None,
    ) -> Tensor:  # fmt: skip
        from rorqual.ops.triton.experts import combine
        from rorqual.ops.triton.fused import swiglu
        from rorqual.ops.triton.grouped import gather_rows
        from rorqual.ops.triton.routing import sort_by_expert

        place, slot, ends = sort_by_expert(chosen_NK, len(down_EDF))
        gu = F.grouped_mm(gather_rows(x_ND, slot, chosen_NK.shape[1]), gate_up_E2FD.mT, offs=ends)
        y = F.grouped_mm(swiglu(*gu.chunk(2, -1)), down_EDF.mT, offs=ends)
        ctx.save_for_backward(x_ND, gate_up_E2FD, down_EDF, gates_NK, gu, place, slot, ends)
        return combine(y, place, gates_NK, add_ND, more_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        from rorqual.ops.triton.experts import combine
        from rorqual.ops.triton.grouped import gated_backward, gather_rows

        x, gate_up, down, gates, gu, place, slot, ends = ctx.saved_tensors
        dout, K = grads[0].contiguous(), gates.shape[1]
        dy = gather_rows(dout, slot, K)
        dgu, hg, dgates = gated_backward(gu, F.grouped_mm(dy, down, offs=ends), slot, gates)
        ddown = F.grouped_mm(dy.mT, hg, offs=ends) if ctx.needs_input_grad[2] else None
        del dy, hg
        dup = F.grouped_mm(dgu.mT, gather_rows(x, slot, K), offs=ends) if ctx.needs_input_grad[1] else None
        dx = combine(F.grouped_mm(dgu, gate_up, offs=ends), place, torch.ones_like(gates))
        add, more = (dout if needed else None for needed in ctx.needs_input_grad[5:7])
        return dx, dup, ddown, dgates, None, add, more


def experts(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, gates_NK: Tensor, chosen_NK: Tensor,
    add_ND: Tensor | None = None, more_ND: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The op of `ops.experts`, plus add and more [N, D] where given. Of what is in between, gate and up alone wait for the
    backward: rows are gathered again, SwiGLU is computed again, and the gates' gradient is <d out W_down, h>, which needs
    no output of an expert. Sums over a token's experts in fp32, in slot order."""
    gate_up, down = (w.to(x_ND.dtype) for w in (gate_up_E2FD, down_EDF))
    return _Experts.apply(x_ND, gate_up, down, gates_NK.contiguous(), chosen_NK.contiguous(), add_ND, more_ND)  # type: ignore[no-untyped-call]
