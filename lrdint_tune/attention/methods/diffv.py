"""DiffV: values of a transformed input are subtracted; one map (seed 002 eq. 7)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lrdint_tune.attention.context import AttentionContext
from lrdint_tune.attention.methods.input_matrix import InputMatrix
from lrdint_tune.attention.shape import AttentionShape


class DiffV(InputMatrix):
    """``out = softmax(q k^T / sqrt(hd)) v'`` with ``v' = x W_V - λ (x W_D) W_V`` (a bias of ``W_V`` belongs to both).

    λ acts on values: ``lam_sharing: head`` gives one per key/value head, and a λ that depends on the token is that of
    the key. The cache holds ``v'``. Arguments as :class:`~lrdint_tune.attention.methods.input_matrix.InputMatrix`.
    """

    name = "diffv"

    def __init__(self, shape: AttentionShape, **options: Any) -> None:
        super().__init__(shape, shape.num_kv_heads, lam_heads=shape.num_kv_heads, **options)

    def forward(self, ctx: AttentionContext) -> Tensor:
        v1, v2 = ctx.project_v(ctx.x), ctx.project_v(self.transformed(ctx))  # [B, N, K, hd]
        v = self.difference(v1, v2, self.lam(ctx.x).transpose(-3, -2))
        return ctx.attend(ctx.q, ctx.k, ctx.values(v, "v"))

    def attention_map(self, ctx: AttentionContext) -> Tensor:
        return ctx.attend(ctx.q, ctx.k, ctx.v)  # the difference is one of values
