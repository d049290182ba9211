"""A dense feed-forward into shared and routed experts: the same neurons, in another order, and a router.

A SwiGLU's output is a sum over its neurons, so it can be cut anywhere. The neurons with the most energy serve every
token: they are the shared experts. The others are grouped by co-activation, with groups of one size (spherical
k-means over which tokens they are strong on), so that a token finds most of what it needs in few groups. The router
is a logistic regression on the layer's input: is this expert among the token's strongest? All experts chosen, with a
router of zeros, is the dense layer itself.

Gates are normalised to a sum of one, so routed_scaling_factor = top-k gives them a mean of one; the regression's logits
are halved, which keeps them near one each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.model.layers import MLP

ROUTER_SLOPE = 0.5
STRONG = 0.25
"""A neuron counts as active on its strongest quarter of the tokens."""


@dataclass(frozen=True)
class ExpertShape:
    """How the neurons are divided: shared * width + routed * width of them; where the layer has more, its weakest go."""

    shared: int
    routed: int
    width: int
    top_k: int


@dataclass(frozen=True)
class Experts:
    """shared_*: the shared experts as one SwiGLU; gate_up [E, 2F, D], down [E, D, F] as `model.moe` stacks them;
    router [E, D]. captured: share of the routed neurons' energy that the chosen experts hold on calibration tokens."""

    shared_gate: Tensor
    shared_up: Tensor
    shared_down: Tensor
    gate_up: Tensor
    down: Tensor
    router: Tensor
    captured: float


def convert_experts(mlp: MLP, x_ND: Tensor, shape: ExpertShape, seed: int) -> Experts:
    """x_ND: calibration inputs of the layer's feed-forward, after its norm."""
    gate, up, down = (p.weight for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    energy_NF = (F.silu(x_ND @ gate.T) * (x_ND @ up.T)).square() * down.square().sum(0)
    shared_size = shape.shared * shape.width
    order = energy_NF.mean(0).argsort(descending=True, stable=True)
    shared, rest = order[:shared_size].sort().values, order[shared_size:][: shape.routed * shape.width].sort().values
    groups_EF = rest[balanced_groups(energy_NF[:, rest], shape.routed, seed)]
    energy_NE = energy_NF[:, groups_EF.flatten()].unflatten(-1, groups_EF.shape).sum(-1)
    router = torch.zeros(shape.routed, x_ND.shape[1])
    if shape.top_k < shape.routed:
        router = fit_router(x_ND, energy_NE, shape.top_k)
    chosen = (x_ND @ router.T).topk(shape.top_k, -1).indices
    captured = energy_NE.gather(-1, chosen).sum() / energy_NE.sum()
    return Experts(
        gate[shared], up[shared], down[:, shared],
        torch.cat((gate[groups_EF], up[groups_EF]), 1), down[:, groups_EF].transpose(0, 1),
        router, captured.item(),
    )  # fmt: skip


def balanced_groups(energy_NF: Tensor, groups: int, seed: int, rounds: int = 12) -> Tensor:
    """Neurons by group, [groups, F / groups]: spherical k-means over where each is strong, every group of one size."""
    N, neurons = energy_NF.shape
    threshold = energy_NF.kthvalue(max(1, round(N * (1 - STRONG))), 0).values
    points_FN = F.normalize((energy_NF > threshold).float().T, dim=-1)
    centres = _first_centres(points_FN, groups, seed)
    size = neurons // groups
    for _ in range(rounds):
        owner = _assign(points_FN @ centres.T, size)
        sums = torch.zeros_like(centres).index_add_(0, owner, points_FN)
        centres = F.normalize(sums, dim=-1)
    return owner.argsort(stable=True).view(groups, size)


def _first_centres(points_FN: Tensor, groups: int, seed: int) -> Tensor:
    """k-means++: each next centre is drawn by how unlike the chosen ones it is."""
    draw = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(points_FN), (1,), generator=draw))]
    for _ in range(groups - 1):
        unlike = (1 - (points_FN @ points_FN[chosen].T).amax(-1)).clamp_min(1e-6).square()
        chosen.append(int(torch.multinomial(unlike, 1, generator=draw)))
    return points_FN[chosen]


def _assign(likeness_FG: Tensor, size: int) -> Tensor:
    """Each neuron to the group it is most like that still has room, the clearest cases first. [F]."""
    neurons, groups = likeness_FG.shape
    best = likeness_FG.topk(min(2, groups), -1).values
    order = (best[:, 0] - best[:, -1]).argsort(descending=True, stable=True).tolist()
    preference = likeness_FG.argsort(dim=-1, descending=True, stable=True).tolist()
    owner, room = [0] * neurons, [size] * groups
    for neuron in order:
        group = next(g for g in preference[neuron] if room[g])
        owner[neuron], room[group] = group, room[group] - 1
    return torch.tensor(owner)


def fit_router(x_ND: Tensor, energy_NE: Tensor, top_k: int, steps: int = 250) -> Tensor:
    """[E, D]: logistic regression on "is among the token's top_k by energy", by Adam, on inputs scaled to unit rms."""
    target = torch.zeros_like(energy_NE).scatter_(1, energy_NE.topk(top_k, -1).indices, 1.0)
    scale = x_ND.square().mean(0).sqrt().clamp_min(1e-6)
    x, batch = x_ND / scale, min(len(x_ND), 4096)
    weight = torch.zeros(energy_NE.shape[1], x_ND.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.02, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for step in range(steps):
        start = (step * batch) % max(1, len(x) - batch + 1)
        rows = slice(start, start + batch)
        with torch.enable_grad():
            F.binary_cross_entropy_with_logits(x[rows] @ weight.T, target[rows], reduction="sum").div(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return ROUTER_SLOPE * weight.detach() / scale
