"""DiffK: the second map has keys of a transformed input (seed 002 eq. 6)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lrdint_tune.attention.context import AttentionContext
from lrdint_tune.attention.methods.input_matrix import InputMatrix
from lrdint_tune.attention.shape import AttentionShape


class DiffK(InputMatrix):
    """``out = O1 - λ O2`` with ``k2 = (x W_D) W_K`` (a bias of ``W_K`` belongs to both) and ``O2 = softmax(q k2^T /
    sqrt(hd)) v``. Arguments as :class:`~lrdint_tune.attention.methods.input_matrix.InputMatrix`."""

    name = "diffk"
    num_maps = 2
    cached_streams = ("k2",)

    def __init__(self, shape: AttentionShape, **options: Any) -> None:
        super().__init__(shape, shape.num_kv_heads, **options)

    def forward(self, ctx: AttentionContext) -> Tensor:
        k2 = ctx.keys(ctx.project_k(self.transformed(ctx)), "k2")
        o1, o2 = ctx.attend(ctx.q, ctx.k, ctx.v), ctx.attend(ctx.q, k2, ctx.v)
        return self.difference(o1, o2, self.lam(ctx.x))
