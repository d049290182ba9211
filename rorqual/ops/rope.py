"""Rotary position embedding in the released interleaved layout, with YaRN (arXiv 2104.09864, 2309.00071).

Stored weights pair neighbours: (x[0], x[1]), (x[2], x[3]), ... share an angle. Permuting pairs into halves gives the
same dot products, and engines that do so on load must permute queries and keys alike; here the layout stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rorqual.config import yarn_mscale


def inverse_frequencies(dim: int, theta: float, scaling: Mapping[str, Any] | None) -> tuple[list[float], float]:
    """The R/2 angular speeds (radians per position), and the factor on cos and sin.

    YaRN divides the slow frequencies by `factor`, keeps those that turn more than beta_fast times over the original
    context, and blends linearly between. Without mscale keys the factor on cos/sin is 0.1 ln(factor) + 1, as in
    transformers; V3 sets mscale = mscale_all_dim, which makes it 1.
    """
    speeds = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    if scaling is None:
        return speeds, 1.0
    factor, original = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])

    def turns_at(turns: float) -> float:
        """The pair index that makes this many turns over the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(turns_at(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(turns_at(scaling.get("beta_slow") or 1)), dim - 1)
    width = max(high - low, 0.001)

    def stretched(i: int) -> float:
        """How far pair i is interpolated: 0 keeps its speed, 1 divides it by the factor."""
        return min(max((i - low) / width, 0.0), 1.0)

    speeds = [w * (1 - stretched(i)) + w / factor * stretched(i) for i, w in enumerate(speeds)]
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if (attention_factor := scaling.get("attention_factor")) is not None:
        return speeds, float(attention_factor)
    if mscale and all_dim:
        return speeds, yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    return speeds, yarn_mscale(factor, 1.0)


def cos_sin(positions: Tensor, speeds: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """positions [..., T] of ints, speeds [R/2] fp32 -> cos, sin [..., T, R/2] fp32."""
    angles = positions[..., None].float() * speeds
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x [..., R] by angles whose cos, sin [..., R/2] broadcast against x's leading axes.
    Computed in fp32, returned in x's dtype."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)
