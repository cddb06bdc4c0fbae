"""Projections from the residual stream to heads, low-rank or full-rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lrdint_tune.errors import ConfigError
from lrdint_tune.options import choice, positive_int

FACTORS = ("per_head", "shared")


class LowRankHeads(nn.Module):
    """``x Wdown Wup`` for every head (seed 001), without bias.

    ``per_head``: each head has its own ``Wdown [D, r]``, stored as one Linear ``D -> heads * r``. ``shared``: all
    heads read one ``D -> r``. Either way ``up`` is ``[heads, r, hd]``. Both are drawn as ``nn.Linear`` would: ``down ~
    U(±1/sqrt(D))``, ``up ~ U(±1/sqrt(r))``.

    Args:
        embed_dim: ``D``.
        num_heads: ``H`` for queries, ``K`` for keys.
        head_dim: ``hd``.
        rank: ``r``.
        factors: ``per_head | shared``.

    Raises:
        ConfigError: ``rank`` < 1 or unknown ``factors``.
    """

    def __init__(self, embed_dim: int, num_heads: int, head_dim: int, *, rank: int, factors: str) -> None:
        super().__init__()
        positive_int("rank", rank, ", or null for full rank")
        choice("factors", factors, FACTORS)
        self.rank = rank
        self.per_head = factors == "per_head"
        self.head_dims = {"up": 0, "down.weight": 0 if self.per_head else None}
        self.down = nn.Linear(embed_dim, num_heads * rank if self.per_head else rank, bias=False)
        self.up = nn.Parameter(torch.empty(num_heads, rank, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Bounds by hand: kaiming_uniform_ would read another fan-in off a 3-D tensor.
        for weight, fan_in in ((self.down.weight, self.down.in_features), (self.up, self.rank)):
            nn.init.uniform_(weight, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, D]`` -> ``[B, N, heads, hd]``."""
        h = self.down(x)
        if self.per_head:
            return torch.einsum("bnhr,hrd->bnhd", h.unflatten(-1, (-1, self.rank)), self.up)
        return torch.einsum("bnr,hrd->bnhd", h, self.up)


class FullRankHeads(nn.Linear):
    """``x W`` for every head: the full-rank form of DIFF and DINT, ``W [D, heads * hd]``, initialised as
    ``nn.Linear``."""

    head_dims: ClassVar[Mapping[str, int | None]] = {"weight": 0}

    def __init__(self, embed_dim: int, num_heads: int, head_dim: int) -> None:
        self.head_dim = head_dim
        super().__init__(embed_dim, num_heads * head_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, D]`` -> ``[B, N, heads, hd]``."""
        return super().forward(x).unflatten(-1, (-1, self.head_dim))


def build_heads(
    embed_dim: int, num_heads: int, head_dim: int, *, rank: int | None, factors: str
) -> LowRankHeads | FullRankHeads:
    """Low-rank heads, or full-rank ones when ``rank`` is None. Raises ConfigError as :class:`LowRankHeads` does."""
    if rank is None:
        if factors != "per_head":
            raise ConfigError(f"factors={factors!r}: has no effect with rank=null (full rank); remove it or set a rank")
        return FullRankHeads(embed_dim, num_heads, head_dim)
    return LowRankHeads(embed_dim, num_heads, head_dim, rank=rank, factors=factors)
