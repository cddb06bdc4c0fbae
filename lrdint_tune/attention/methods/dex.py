"""DEX: a matrix per head on the attention output (seed 002 eq. 11)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrdint_tune.attention.context import AttentionContext
from lrdint_tune.attention.methods.base import DifferentialMethod, identity_matrices
from lrdint_tune.attention.shape import AttentionShape
from lrdint_tune.errors import ConfigError
from lrdint_tune.options import choice, positive_int

SHARINGS = ("head", "layer")
HEADS = ("all", "top_entropy")


class Dex(DifferentialMethod):
    """``out = O1 (I - λ W_DEX)``, ``W_DEX`` identity at the start. (Seed 002's eq. 2, ``(I - λ) W_DEX``, is not the
    identity at λ = 0.)

    Args:
        shape: the layer's sizes.
        sharing: one ``W_DEX`` ``[hd, hd]`` per ``head``, or one for the ``layer``.
        heads: ``all``, or ``top_entropy``: only the ``top_k`` heads whose rows of ``A1`` have the highest mean entropy
            on some calibration batches; the buffer ``selected`` (float32 ``[H]``, saved with the model) says which.
            Until calibrated that is every head.
        top_k: how many; None takes half of the heads.
        options: those of :class:`~lrdint_tune.attention.methods.base.DifferentialMethod`.

    Raises:
        ConfigError: for a bad option value.
    """

    name = "dex"
    selected: Tensor

    def __init__(
        self,
        shape: AttentionShape,
        *,
        sharing: str = "head",
        heads: str = "all",
        top_k: int | None = None,
        lam: str = "annealed",
        **options: Any,
    ) -> None:
        super().__init__(shape, lam=lam, **options)
        self.num_heads = shape.num_heads
        matrices = shape.num_heads if choice("sharing", sharing, SHARINGS) == "head" else 1
        self.by_entropy = choice("heads", heads, HEADS) == "top_entropy"
        if top_k is not None:
            positive_int("top_k", top_k)
            if not self.by_entropy:
                raise ConfigError(f"top_k={top_k}: has no effect with heads='all'; remove it or set heads=top_entropy")
            if top_k > shape.num_heads:
                raise ConfigError(f"top_k={top_k}: there are {shape.num_heads} heads; lower it")
        self.top_k = top_k or default_top_k(shape)
        self.head_dims = {"w_dex": 0 if sharing == "head" else None}
        self.w_dex = nn.Parameter(torch.empty(matrices, shape.head_dim, shape.head_dim))
        if self.by_entropy:
            self.register_buffer("selected", torch.empty(shape.num_heads, dtype=torch.float32))
        self.entropy: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        identity_matrices(self.w_dex)
        if self.by_entropy:
            nn.init.ones_(self.selected)

    def forward(self, ctx: AttentionContext) -> Tensor:
        if self.entropy is not None:
            self.entropy += ctx.mean_row_entropy(ctx.q, ctx.k)
        o1 = ctx.attend(ctx.q, ctx.k, ctx.v)
        lam = self.lam(ctx.x)
        if self.by_entropy:
            lam = lam * self.selected.view(-1, 1, 1).to(lam.dtype)
        return self.difference(o1, o1 @ self.w_dex, lam)

    def attention_map(self, ctx: AttentionContext) -> Tensor:
        return ctx.attend(ctx.q, ctx.k, ctx.v)  # W_DEX mixes features: no map

    def tensor_parallel_refusal(self, size: int) -> str | None:
        if self.by_entropy:
            return "heads='top_entropy': chooses among all heads, which tensor parallelism splits; use heads=all"
        return None

    def products_per_token(self, seq_len: int) -> float:
        matrices, hd, _ = self.w_dex.shape
        return super().products_per_token(seq_len) + (self.num_heads - matrices) * hd**2  # one may serve every head

    @classmethod
    def full_options(cls, shape: AttentionShape, options: Mapping[str, Any]) -> dict[str, Any]:
        filled = super().full_options(shape, options)
        if filled["heads"] == "top_entropy" and filled["top_k"] is None:
            filled["top_k"] = default_top_k(shape)
        return filled

    @property
    def needs_calibration(self) -> bool:
        return self.by_entropy

    def start_calibration(self) -> Tensor:
        self.entropy = torch.zeros(self.num_heads, dtype=torch.float32, device=self.selected.device)
        return self.entropy

    def finish_calibration(self) -> None:
        assert self.entropy is not None
        highest = self.entropy.topk(self.top_k).indices
        self.selected.zero_()[highest] = 1.0
        self.entropy = None


def default_top_k(shape: AttentionShape) -> int:
    return max(1, shape.num_heads // 2)
