"""A matrix on the layer's input before one of the projections: what DiffQ, DiffK and DiffV share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrdint_tune.attention.context import AttentionContext
from lrdint_tune.attention.methods.base import DifferentialMethod, identity_matrices
from lrdint_tune.attention.shape import AttentionShape


class InputMatrix(DifferentialMethod):
    """``x W_D`` with ``W_D`` ``[D, D]``, identity at the start.

    Args:
        shape: the layer's sizes.
        projected_heads: those of the pretrained projection that is used a second time (``H``, or ``K``). Not an option.
        lam_heads: as in the base. Not an option.
        options: those of :class:`~lrdint_tune.attention.methods.base.DifferentialMethod`.
    """

    head_dims = {"w_d": None}

    def __init__(
        self,
        shape: AttentionShape,
        projected_heads: int,
        lam_heads: int | None = None,
        *,
        lam: str = "annealed",
        **options: Any,
    ) -> None:
        super().__init__(shape, lam_heads, lam=lam, **options)
        self.projected = projected_heads * shape.head_dim
        self.w_d = nn.Parameter(torch.empty(shape.embed_dim, shape.embed_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        identity_matrices(self.w_d)

    def products_per_token(self, seq_len: int) -> float:
        return super().products_per_token(seq_len) + self.w_d.shape[0] * self.projected

    def transformed(self, ctx: AttentionContext) -> Tensor:
        """``x W_D``, ``[B, N, D]``."""
        return ctx.x @ self.w_d
