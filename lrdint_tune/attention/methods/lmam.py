"""LMAM: add a low-rank attention map that no token changes (seed 004 eq. 6-13)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrdint_tune.attention.context import AttentionContext
from lrdint_tune.attention.layout import Layout
from lrdint_tune.attention.methods.base import AttentionMethod, warn_once
from lrdint_tune.attention.shape import AttentionShape
from lrdint_tune.attention.static_map import ALIGNMENTS
from lrdint_tune.attention.static_map import prepare as prepare_static
from lrdint_tune.errors import ConfigError
from lrdint_tune.options import choice, flag, number, positive_int

POSITIONS = ("pe", "none")
INERT_SCALE = 1e-5
DEFAULT_RANK = 2


class Lmam(AttentionMethod):
    """``out = O1 + tril(S) v`` on ``n`` positions of each document, ``S = s (W_a + PE)(W_b + PE)``.

    ``W_a`` ``[H_s, n, r]``, ``W_b`` ``[H_s, r, n]``; query head ``j`` uses map ``j mod H_s``. ``PE_pos = 1 /
    10000^(2 pos / n)`` is added along the ``n`` axis of each factor. The seed gives no initialisation: here ``W_a`` as
    ``nn.Linear`` and ``W_b = -PE``, so that ``S`` is 0 at the start; ``W_a`` then has a gradient from the second step
    on. The parameter ``b`` is ``W_b + PE`` itself, zeros at the start: the same function, but in bf16 the sum of a PE
    of up to 1 and small updates would lose them. What PE changes is therefore the factor ``a`` alone.

    Args:
        shape: the layer's sizes.
        heads: ``H_s``, a divisor of ``H``; None takes ``H``.
        n: positions.
        rank: ``r``; None takes 2.
        scale: ``s``. Seed 004 prints 1/255 (RoBERTa) to 1/(4096·600) (LLaMA), at which the map hardly moves.
        alignment: ``start``, the first ``n`` positions of each document; or ``end``, its last ``n`` (the seed's
            long-sequence form), which depends on the final length: no KV cache.
        position: ``pe``, or ``none`` for the seed's ¬P.
        inside_softmax: the seed's ¬N, ``softmax(q k^T / sqrt(hd) + S) v``: no negative weights. It needs the dense map.
        softmax_map: the seed's ¬S, ``O1 + softmax(S) v`` with the softmax over the positions up to each row's own. Not
            the identity at the start.
        full_rank: the seed's ¬L, ``S = s W`` with ``W`` ``[H_s, n, n]``, zero at the start; there are no factors for a
            PE.

    Raises:
        ConfigError: for a bad option value.
    """

    name = "lmam"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        heads: int | None = None,
        n: int = 128,
        rank: int | None = None,
        scale: float = 1 / 255,
        alignment: str = "start",
        position: str = "pe",
        inside_softmax: bool = False,
        softmax_map: bool = False,
        full_rank: bool = False,
    ) -> None:
        super().__init__()
        heads = shape.num_heads if heads is None else positive_int("heads", heads)
        if shape.num_heads % heads:
            raise ConfigError(f"heads={heads}: must divide the model's {shape.num_heads} query heads")
        positive_int("n", n)
        self.num_heads, self.head_dim, self.n = shape.num_heads, shape.head_dim, n
        self.scale = number("scale", scale, positive=True)
        if scale < INERT_SCALE:
            warn_once(f"scale={scale:g}: leaves the map nearly where it starts; try 1/255, or a larger learning rate")
        self.alignment = choice("alignment", alignment, ALIGNMENTS)
        self.with_pe = choice("position", position, POSITIONS) == "pe"
        self.inside_softmax = flag("inside_softmax", inside_softmax)
        self.biases_logits = self.inside_softmax
        self.softmax_map = flag("softmax_map", softmax_map)
        self.full_rank = flag("full_rank", full_rank)
        if inside_softmax and softmax_map:
            raise ConfigError("softmax_map=True: has no meaning together with inside_softmax; choose one")
        if alignment == "end":
            self.needs_document_ends = True
            self.caution = (
                "alignment=end: a row's output depends on how many tokens follow it. Training loss and ordinary "
                "validation loss see the length of what is to be predicted; generation does not"
            )
            self.context_parallel_refusal = (
                "alignment='end': with context_parallel_dim > 1 a process does not know the rows that follow its own; "
                "use alignment=start"
            )
            self.cache_refusal = (
                "alignment='end': generation with a cache is refused, the map's place depends on the final length; "
                "use alignment=start"
            )
        if full_rank:
            for option, value, default in (("rank", rank, None), ("position", position, "pe")):
                if value != default:
                    raise ConfigError(f"{option}={value!r}: has no effect with full_rank=true; remove it")
            self.w = nn.Parameter(torch.empty(heads, n, n))
        else:
            rank = DEFAULT_RANK if rank is None else positive_int("rank", rank)
            self.a = nn.Parameter(torch.empty(heads, n, rank))
            self.b = nn.Parameter(torch.empty(heads, rank, n))
        own = heads == shape.num_heads
        self.head_dims = {name: 0 if own else None for name, _ in self.named_parameters()}
        self.maps_per_layer = heads
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.full_rank:
            nn.init.zeros_(self.w)
            return
        bound = 1 / math.sqrt(self.a.shape[-1])
        nn.init.uniform_(self.a, -bound, bound)
        nn.init.zeros_(self.b)

    @classmethod
    def full_options(cls, shape: AttentionShape, options: Mapping[str, Any]) -> dict[str, Any]:
        filled = dict(options)
        if filled["heads"] is None:
            filled["heads"] = shape.num_heads
        if filled["rank"] is None and not filled["full_rank"]:
            filled["rank"] = DEFAULT_RANK
        return filled

    def products_per_token(self, seq_len: int) -> float:
        # The maps themselves, and their product with each head's values, once for the sequence.
        maps = 0 if self.full_rank else self.a.numel() * self.n
        return (maps + self.num_heads * min(self.n, seq_len) ** 2 * self.head_dim) / seq_len

    def tensor_parallel_refusal(self, size: int) -> str | None:
        heads = self.num_heads // size
        if self.maps_per_layer != self.num_heads and heads % self.maps_per_layer:
            return (
                f"heads={self.maps_per_layer}: query head j uses map j mod {self.maps_per_layer}, so not every "
                f"process's {heads} heads begin with the first; make it {self.num_heads} or a divisor of {heads}"
            )
        return None

    def differs_at_start(self) -> list[str]:
        return ["softmax_map adds a map whose rows sum to 1"] if self.softmax_map else []

    def prepare(self, layout: Layout) -> None:
        if not self.inside_softmax:
            prepare_static(layout, self.n)

    def forward(self, ctx: AttentionContext) -> Tensor:
        maps = self.maps()
        if self.inside_softmax:
            return ctx.attend(ctx.q, ctx.k, ctx.v, bias=ctx.static_bias(maps, alignment=self.alignment))
        o1 = ctx.attend(ctx.q, ctx.k, ctx.v)
        added = ctx.attend_static(maps, ctx.v, alignment=self.alignment, softmax=self.softmax_map)
        self.observe(o1, added)
        return o1 + added

    def maps(self) -> Tensor:
        """``S``, ``[H_s, n, n]``."""
        if self.full_rank:
            return self.w * self.scale
        a = self.a + position_encoding(self.a).unsqueeze(-1) if self.with_pe else self.a
        return (a @ self.b) * self.scale


def position_encoding(a: Tensor) -> Tensor:
    """``PE`` ``[n]`` for ``a`` ``[H_s, n, r]``, in its dtype."""
    n = a.shape[1]
    exponent = torch.arange(n, dtype=torch.float64, device=a.device) * (-2 / n)
    return torch.pow(10_000.0, exponent).to(a.dtype)
