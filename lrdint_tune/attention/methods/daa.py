"""DAA: the second map sees the same queries through a matrix per head (seed 002 eq. 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrdint_tune.attention.context import AttentionContext
from lrdint_tune.attention.methods.base import DifferentialMethod, identity_matrices
from lrdint_tune.attention.shape import AttentionShape
from lrdint_tune.options import choice

POSITIONS = ("before", "after")


class Daa(DifferentialMethod):
    """``out = O1 - λ O2`` with ``O2 = softmax(q W_DAA k^T / sqrt(hd)) v``, ``W_DAA`` ``[H, hd, hd]``, identity at the
    start.

    Args:
        shape: the layer's sizes.
        position: ``before`` RoPE, where the product keeps relative positions, or ``after`` it. The seed does not say.
        options: those of :class:`~lrdint_tune.attention.methods.base.DifferentialMethod`.

    Raises:
        ConfigError: for a bad option value.
    """

    name = "daa"
    num_maps = 2
    head_dims = {"w_daa": 0}
    rotary_dims = {"w_daa": (1, 2)}

    def __init__(
        self, shape: AttentionShape, *, position: str = "before", lam: str = "annealed", **options: Any
    ) -> None:
        super().__init__(shape, lam=lam, **options)
        self.position = choice("position", position, POSITIONS)
        self.w_daa = nn.Parameter(torch.empty(shape.num_heads, shape.head_dim, shape.head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        identity_matrices(self.w_daa)

    def forward(self, ctx: AttentionContext) -> Tensor:
        if self.position == "before":
            q2 = ctx.queries(torch.einsum("bnhd,hde->bnhe", ctx.q_unrotated, self.w_daa))
        else:
            q2 = ctx.q @ self.w_daa
        o1, o2 = ctx.attend(ctx.q, ctx.k, ctx.v), ctx.attend(q2, ctx.k, ctx.v)
        return self.difference(o1, o2, self.lam(ctx.x))
