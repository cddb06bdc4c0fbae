"""DIFF: subtract a second attention map (Differential Transformer; seeds 000, 001)."""

from __future__ import annotations

import logging
from functools import cache

from torch import Tensor

from lrdint_tune.attention.context import AttentionContext
from lrdint_tune.attention.lambdas import build_lambda
from lrdint_tune.attention.methods.base import AttentionMethod, AttentionShape, scale_multiplier
from lrdint_tune.attention.methods.low_rank import build_heads

log = logging.getLogger(__name__)


@cache
def _warn_once(message: str) -> None:
    """Every layer would say it."""
    log.warning(message)


class Diff(AttentionMethod):
    """``out = O1 - λ O2`` with ``O2 = softmax(q2 k2^T / sqrt(d2)) v`` (methods.md 3).

    Args:
        shape: the layer's sizes.
        rank: ``r`` of ``q2 = x Wdown Wup`` and ``k2``; None for full-rank ``W_Q2``, ``W_K2``.
        factors: ``per_head | shared`` (low rank only).
        secondary_scale: ``seed | variance | standard`` or the multiplier of ``q2 k2^T`` itself.
        lam, lam_init, lam_sharing, anneal_steps: the λ form, see :func:`~lrdint_tune.attention.lambdas.build_lambda`.

    Raises:
        ConfigError: for a bad option value.
    """

    name = "diff"
    cached_streams = ("k2",)
    num_maps = 2

    def __init__(
        self,
        shape: AttentionShape,
        *,
        rank: int | None = 8,
        factors: str = "per_head",
        secondary_scale: str | float = "seed",
        lam: str = "learned",
        lam_init: float | None = None,
        lam_sharing: str = "head",
        anneal_steps: int | None = None,
    ) -> None:
        super().__init__()
        if rank is None and secondary_scale == "seed":
            _warn_once(
                "rank=null with secondary_scale=seed: hd/81 was derived for low-rank factors; the published "
                "full-rank form is "
                "secondary_scale=standard"
            )
        self.scale2 = scale_multiplier(secondary_scale, shape.head_dim)
        d, hd = shape.embed_dim, shape.head_dim
        self.q2 = build_heads(d, shape.num_heads, hd, rank=rank, factors=factors)
        self.k2 = build_heads(d, shape.num_kv_heads, hd, rank=rank, factors=factors)
        self.lam = build_lambda(
            lam, shape.num_heads, lam_init=lam_init, lam_sharing=lam_sharing, anneal_steps=anneal_steps
        )

    def forward(self, ctx: AttentionContext) -> Tensor:
        o1, o2 = self.signal_and_noise(ctx)
        lam = self.lam(ctx.x)
        self.observe(o1, o2)
        return o1 - lam * o2

    def signal_and_noise(self, ctx: AttentionContext) -> tuple[Tensor, Tensor]:
        """``O1 = A1 v`` and ``O2 = A2 v``, both ``[B, H, N, hd]``."""
        o1 = ctx.attend(ctx.q, ctx.k, ctx.v)
        q2, k2 = ctx.queries(self.q2(ctx.x)), ctx.keys(self.k2(ctx.x), "k2")
        return o1, ctx.attend(q2, k2, ctx.v, scale=self.scale2)
