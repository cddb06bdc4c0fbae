"""DiffLoRA: LoRA-shaped queries and keys of a second map, and LoRA on those of the first (seed 003)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from lrdint_tune.attention.context import AttentionContext
from lrdint_tune.attention.methods.heads import LowRankHeads
from lrdint_tune.attention.methods.second_map import SecondMap
from lrdint_tune.attention.shape import AttentionShape
from lrdint_tune.options import flag, number, positive_int


class DiffLora(SecondMap):
    """``out = O1 - λ O2`` with ``q1 = x W_Q + (α/r) x A B`` (``B`` zero at the start) and ``q2 = (α/r) x A B`` (``A``
    and ``B`` as ``nn.Linear``), keys likewise, all at ``1/sqrt(hd)``.

    By the paper's design NOT the identity at step 0: λ is above 0 from the start. ``lam: fixed`` with ``lam_init: 0``
    is, and leaves the second map asleep.

    Args:
        shape: the layer's sizes.
        rank: ``r``, one factor ``D -> r`` for all heads.
        lora_alpha: ``α``.
        positive_lora: whether ``q1`` and ``k1`` have LoRA too.
        lam: default ``fixed`` (0.1), the paper's stable variant; ``exponential`` is its other one.
        options: those of :class:`~lrdint_tune.attention.methods.second_map.SecondMap`.

    Raises:
        ConfigError: for a bad option value.
    """

    name = "difflora"
    rotary_dims = {**SecondMap.rotary_dims, "q1.up": (2,), "k1.up": (2,)}

    def __init__(
        self,
        shape: AttentionShape,
        *,
        rank: int = 8,
        lora_alpha: float = 16,
        positive_lora: bool = True,
        lam: str = "fixed",
        secondary_keys: str = "low_rank",
        **options: Any,
    ) -> None:
        positive_int("rank", rank)
        lora_scale = number("lora_alpha", lora_alpha, positive=True) / rank
        # α/r stands in q2, and in k2 where that is low-rank; RoPE is linear, so it can go into the scale of the logits.
        scale2 = (lora_scale**2 if secondary_keys == "low_rank" else lora_scale) / math.sqrt(shape.head_dim)
        super().__init__(shape, rank, "shared", scale2, lam=lam, secondary_keys=secondary_keys, **options)
        self.lora_scale = lora_scale
        self.q1 = self.k1 = None
        if flag("positive_lora", positive_lora):
            d, hd = shape.embed_dim, shape.head_dim
            self.q1 = LowRankHeads(d, shape.num_heads, hd, rank=rank, factors="shared")
            self.k1 = LowRankHeads(d, shape.num_kv_heads, hd, rank=rank, factors="shared")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for lora in (self.q1, self.k1):
            if lora is not None:
                nn.init.zeros_(lora.up)

    def combined(self, ctx: AttentionContext) -> Tensor:
        if self.q1 is None or self.k1 is None:
            q1, k1 = ctx.q, ctx.k
        else:
            q1 = ctx.queries(ctx.project_q(ctx.x) + self.lora_scale * self.q1(ctx.x))
            k1 = ctx.keys(ctx.project_k(ctx.x) + self.lora_scale * self.k1(ctx.x), "k")
        o1, o2 = ctx.attend(q1, k1, ctx.v), self.noise(ctx, k1)
        return self.difference(o1, o2, self.lam(ctx.x))
