"""DeepSeekMoE: one shared expert for everyone, fine-grained routed experts by affinity (DeepSeek-V3 section 2.1.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.config import ModelConfig
from rorqual.model.batch import Routing
from rorqual.model.layers import MLP
from rorqual.ops import training
from rorqual.ops.experts import experts_backends, experts_fused, narrow
from rorqual.ops.formats import Weight
from rorqual.ops.fused import fuses, trains
from rorqual.ops.router import route

DECODING = 256
"""Up to so many tokens the experts are computed by the kernels for few tokens (`ops.triton.experts`), on a GPU."""


class Gate(nn.Module):
    """weight [E, D]; e_score_correction_bias [E] is fp32 always and moved by the bias update, never by a gradient."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cfg.n_routed_experts, cfg.hidden_size))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.empty(cfg.n_routed_experts, dtype=torch.float32))
        self.top_k, self.scale, self.normalise = cfg.num_experts_per_tok, cfg.routed_scaling_factor, cfg.norm_topk_prob
        self.n_group, self.topk_group = cfg.n_group, cfg.topk_group
        self.fixed = False  # `model.fixed`

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gates [N, K] fp32, chosen experts [N, K], affinities [N, E] fp32."""
        if self.fixed or (fuses(x_ND) and len(x_ND) <= DECODING):
            from rorqual.ops.triton.stream import rows_dot

            (logits_NE,) = rows_dot(x_ND, Weight.plain(self.weight), dtype=torch.float32)
        elif trains(x_ND) and x_ND.dtype == torch.bfloat16:
            logits_NE = training.gate_logits(x_ND, self.weight)
        else:
            logits_NE = F.linear(x_ND.float(), self.weight.float())
        choose = training.route if trains(x_ND) else route
        return choose(
            logits_NE,
            self.e_score_correction_bias,
            self.top_k,
            self.n_group,
            self.topk_group,
            self.normalise,
            self.scale,
        )


class RoutedExperts(nn.Module):
    """All routed experts stacked, so that one grouped op runs them: gate_up_proj [E, 2F, D] (gate first), down_proj
    [E, D, F]. The checkpoint's per-expert tensors are views of these (`checkpoint.names`)."""

    def __init__(self, cfg: ModelConfig, backend: str) -> None:
        super().__init__()
        E, width, D = cfg.n_routed_experts, cfg.moe_intermediate_size, cfg.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, width))
        self.run = experts_backends.get(backend)
        self.fixed = False

    @property
    def kernel_weights(self) -> tuple[Weight, Weight]:
        return Weight.plain(self.gate_up_proj.unflatten(1, (2, -1))), Weight.plain(self.down_proj)

    @property
    def is_plain(self) -> bool:
        """Whether a backend of `ops.experts` multiplies, and not FP8 (`model.precision`)."""
        return self.run in experts_backends.table.values()

    def forward(self, x_ND: Tensor, gates_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        if self.fixed:
            from rorqual.ops.triton.fp8 import tile_experts

            return tile_experts(x_ND, *self.kernel_weights, gates_NK, chosen_NK, fixed=True)
        return self.run(x_ND, self.gate_up_proj, self.down_proj, gates_NK, chosen_NK)


class MoE(nn.Module):
    def __init__(self, cfg: ModelConfig, backend: str) -> None:
        super().__init__()
        self.gate = Gate(cfg)
        self.experts = RoutedExperts(cfg, backend)
        self.shared_experts = MLP(cfg.hidden_size, cfg.moe_intermediate_size * cfg.n_shared_experts)
        self.fixed = False

    def forward(self, x_BTD: Tensor, add_BTD: Tensor | None = None) -> tuple[Tensor, Routing]:
        """add: joins the sum (the residual stream)."""
        x_ND = x_BTD.flatten(0, 1)
        gates_NK, chosen_NK, scores_NE = self.gate(x_ND)
        experts, shared = self.experts, self.shared_experts
        few = fuses(x_ND) and len(x_ND) <= DECODING and not self.fixed
        weights = experts.kernel_weights if few else None
        if weights is not None:
            from rorqual.ops.triton.experts import routed_experts

            add_ND, own = None if add_BTD is None else add_BTD.flatten(0, 1), shared.kernel_weights
            if own is None or own[0].kind != weights[0].kind:
                add_ND, own = shared(x_ND) if add_ND is None else add_ND + shared(x_ND), None
            out_ND = routed_experts(x_ND, *weights, gates_NK, chosen_NK, add_ND, own)
            return out_ND.view_as(x_BTD), Routing(scores_NE, chosen_NK)
        fused = isinstance(experts, RoutedExperts) and experts.run is experts_fused and not self.fixed
        if fused and (fuses(x_ND) or (trains(x_ND) and not narrow(experts.down_proj, chosen_NK.shape[1]))):
            add_ND, more_ND = None if add_BTD is None else add_BTD.flatten(0, 1), shared(x_ND)
            pair = experts.gate_up_proj, experts.down_proj
            out_ND = training.experts(x_ND, *pair, gates_NK, chosen_NK, add_ND, more_ND)
            return out_ND.view_as(x_BTD), Routing(scores_NE, chosen_NK)
        out_BTD = experts(x_ND, gates_NK, chosen_NK).view_as(x_BTD) + shared(x_BTD)
        return out_BTD if add_BTD is None else add_BTD + out_BTD, Routing(scores_NE, chosen_NK)
