"""DIFF: subtract a second attention map (Differential Transformer; seeds 000, 001)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lrdint_tune.attention.context import AttentionContext
from lrdint_tune.attention.methods.base import warn_once
from lrdint_tune.attention.methods.second_map import SecondMap, scale_multiplier
from lrdint_tune.attention.shape import AttentionShape


class Diff(SecondMap):
    """``out = O1 - λ O2`` with ``O2 = softmax(q2 k2^T / sqrt(d2)) v`` (docs/methods.md).

    Args:
        shape: the layer's sizes.
        rank: ``r`` of ``q2 = x Wdown Wup`` and ``k2``; None for full-rank ``W_Q2``, ``W_K2``.
        factors: ``per_head | shared`` (low rank only).
        secondary_scale: ``seed | variance | standard`` or the multiplier of ``q2 k2^T`` itself.
        options: those of :class:`~lrdint_tune.attention.methods.second_map.SecondMap`.

    Raises:
        ConfigError: for a bad option value.
    """

    name = "diff"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        rank: int | None = 8,
        factors: str = "per_head",
        secondary_scale: str | float = "seed",
        **options: Any,
    ) -> None:
        if rank is None and secondary_scale == "seed":
            warn_once(
                "rank=null with secondary_scale=seed: hd/81 was derived for low-rank factors; the published "
                "full-rank form is secondary_scale=standard"
            )
        super().__init__(shape, rank, factors, scale_multiplier(secondary_scale, shape.head_dim), **options)

    def combined(self, ctx: AttentionContext) -> Tensor:
        o1 = ctx.attend(ctx.q, ctx.k, ctx.v)
        return self.difference(o1, self.noise(ctx, ctx.k), self.lam(ctx.x))
