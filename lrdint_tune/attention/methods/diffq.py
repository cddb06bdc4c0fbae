"""DiffQ: the second map has queries of a transformed input (seed 002 eq. 5)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lrdint_tune.attention.context import AttentionContext
from lrdint_tune.attention.methods.input_matrix import InputMatrix
from lrdint_tune.attention.shape import AttentionShape


class DiffQ(InputMatrix):
    """``out = O1 - λ O2`` with ``q2 = (x W_D) W_Q`` (a bias of ``W_Q`` belongs to both) and ``O2 = softmax(q2 k^T /
    sqrt(hd)) v``. Arguments as :class:`~lrdint_tune.attention.methods.input_matrix.InputMatrix`."""

    name = "diffq"
    num_maps = 2

    def __init__(self, shape: AttentionShape, **options: Any) -> None:
        super().__init__(shape, shape.num_heads, **options)

    def forward(self, ctx: AttentionContext) -> Tensor:
        q2 = ctx.queries(ctx.project_q(self.transformed(ctx)))
        o1, o2 = ctx.attend(ctx.q, ctx.k, ctx.v), ctx.attend(q2, ctx.k, ctx.v)
        return self.difference(o1, o2, self.lam(ctx.x))
