"""The seeds' own listing of low-rank DINT, every N x N map in memory: what the fused form is measured against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lrdint_tune.attention.context import AttentionContext
from lrdint_tune.attention.methods.diff import Diff


class Listing(Diff):
    """``out = (A1 - λ A2 + λ A3) v`` as printed in seed 001, as one would type it.

        A1 = softmax(q1 k1^T / sqrt(d))      A2 = softmax(q2 k2^T / sqrt(d2)), d2 = d / 81
        A3 = repeat(1/N sum_i A1[i, :], N)

    Keys and values are repeated for the query heads of a group, and A1 and A2 are causal; A3 averages over all rows,
    as printed, so this is ``integral: sequence``, which leaks the future. Single documents without padding or cache.
    Parameters, projections and RoPE are those of the package's ``dint``: one state dict loads into both.
    """

    name = "listing"

    def forward(self, ctx: AttentionContext) -> Tensor:
        assert self.k2 is not None
        d = ctx.q.shape[-1]
        group = ctx.q.shape[1] // ctx.k.shape[1]
        q1, k1 = ctx.q, ctx.k.repeat_interleave(group, dim=1)
        q2, k2 = ctx.queries(self.q2(ctx.x)), ctx.keys(self.k2(ctx.x), "k2").repeat_interleave(group, dim=1)
        v = ctx.v.repeat_interleave(group, dim=1)
        lam = self.lam(ctx.x)

        n = q1.shape[2]
        future = torch.ones(n, n, dtype=torch.bool, device=q1.device).triu(1)
        a1 = torch.softmax((q1 @ k1.transpose(-1, -2) / math.sqrt(d)).masked_fill(future, -math.inf), dim=-1)
        a2 = torch.softmax((q2 @ k2.transpose(-1, -2) / math.sqrt(d / 81)).masked_fill(future, -math.inf), dim=-1)
        a3 = a1.mean(dim=-2, keepdim=True).repeat(1, 1, n, 1)
        return (a1 - lam * a2 + lam * a3) @ v
