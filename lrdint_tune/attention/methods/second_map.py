"""A second attention map with queries and keys of its own: what DIFF, DINT and DiffLoRA share."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from lrdint_tune.attention.context import AttentionContext
from lrdint_tune.attention.methods.base import DifferentialMethod, warn_once
from lrdint_tune.attention.methods.heads import build_heads
from lrdint_tune.attention.shape import AttentionShape
from lrdint_tune.errors import ConfigError
from lrdint_tune.options import choice, flag

NOISE_HEADS = ("query", "kv")
SECONDARY_KEYS = ("low_rank", "shared")
_SCALE_DIVISORS = {"seed": 81.0, "variance": 9.0, "standard": 1.0}


class SecondMap(DifferentialMethod):
    """``O2 = softmax(q2 k2^T * scale2) v`` with ``q2 = x Wdown Wup`` and ``k2`` likewise (docs/methods.md).

    Args:
        shape: the layer's sizes.
        rank: ``r``; None for full-rank ``W_Q2``, ``W_K2``.
        factors: ``per_head | shared`` (low rank only).
        scale2: the multiplier of ``q2 k2^T``. Not an option.
        noise_heads: ``query``, or ``kv`` for one secondary query head per key/value head: ``A2`` then serves the ``H /
            K`` query heads of a group and costs ``K / H`` of ``A1``.
        secondary_keys: ``low_rank``, or ``shared`` for ``k2 = k1``: no new key tensors, and the KV cache of the base
            model.
        sublayer_norm: after the combination an RMSNorm over each head's ``hd`` features (one weight ``[hd]`` for all
            heads) times ``1 - λ_init``, as DIFF has it when trained from scratch. It destroys a pretrained model.
        options: those of :class:`~lrdint_tune.attention.methods.base.DifferentialMethod`.

    Raises:
        ConfigError: for a bad option value.
    """

    head_dims = {"norm.weight": None}
    rotary_dims = {"q2.up": (2,), "k2.up": (2,), "q2.weight": (0,), "k2.weight": (0,)}

    def __init__(
        self,
        shape: AttentionShape,
        rank: int | None,
        factors: str,
        scale2: float,
        *,
        noise_heads: str = "query",
        secondary_keys: str = "low_rank",
        sublayer_norm: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(shape, **options)
        choice("noise_heads", noise_heads, NOISE_HEADS)
        choice("secondary_keys", secondary_keys, SECONDARY_KEYS)
        d, hd = shape.embed_dim, shape.head_dim
        heads = shape.num_heads if noise_heads == "query" else shape.num_kv_heads
        self.scale2 = scale2
        self.heads_per_noise_head = shape.num_heads // heads
        self.num_maps = 1 + heads / shape.num_heads
        self.q2 = build_heads(d, heads, hd, rank=rank, factors=factors)
        self.k2 = None
        if secondary_keys == "low_rank":
            self.k2 = build_heads(d, shape.num_kv_heads, hd, rank=rank, factors=factors)
            self.cached_streams = ("k2",)
        self.norm = None
        if flag("sublayer_norm", sublayer_norm):
            if not self.lam.has_constant:
                raise ConfigError(
                    f"sublayer_norm=true: needs a λ_init, which lam={self.lam.name!r} has not; choose another lam"
                )
            warn_once(
                "sublayer_norm=true: for training from scratch; pretrained weights do not survive a norm after the "
                "subtraction"
            )
            self.norm = nn.RMSNorm(hd, eps=1e-5)

    def differs_at_start(self) -> list[str]:
        return super().differs_at_start() + ([] if self.norm is None else ["sublayer_norm normalises the output"])

    def forward(self, ctx: AttentionContext) -> Tensor:
        return self.normalise(self.combined(ctx))

    @abstractmethod
    def combined(self, ctx: AttentionContext) -> Tensor:
        """The output before the sublayer norm, ``[B, H, N, hd]``."""

    def attention_map(self, ctx: AttentionContext) -> Tensor:
        return self.combined(ctx)  # the norm is over features

    def noise(self, ctx: AttentionContext, k1: Tensor) -> Tensor:
        """``O2 = A2 v``, ``[B, H, N, hd]``; ``k1`` ``[B, K, M, hd]`` are the first map's keys."""
        q2 = ctx.queries(self.q2(ctx.x))
        k2 = k1 if self.k2 is None else ctx.keys(self.k2(ctx.x), "k2")
        o2 = ctx.attend(q2, k2, ctx.v, scale=self.scale2)
        return o2 if self.heads_per_noise_head == 1 else o2.repeat_interleave(self.heads_per_noise_head, dim=1)

    def normalise(self, out: Tensor) -> Tensor:
        """The sublayer norm, if there is one."""
        return out if self.norm is None else self.norm(out) * (1 - self.lam.lam_init)


def scale_multiplier(option: str | float, head_dim: int) -> float:
    """The multiplier of ``q2 k2^T``, that is ``1/sqrt(d2)`` (docs/methods.md).

    ``seed``: ``d2 = hd/81`` as printed in seed 001; ``variance``: ``d2 = hd/9``, which the seed's own argument gives
    with ``nn.Linear``'s initialisation; ``standard``: ``d2 = hd``; a positive number is the multiplier itself.

    Raises:
        ConfigError: for anything else.
    """
    if isinstance(option, str) and option in _SCALE_DIVISORS:
        return (_SCALE_DIVISORS[option] / head_dim) ** 0.5
    if isinstance(option, (int, float)) and not isinstance(option, bool) and 0 < option < math.inf:
        return float(option)
    raise ConfigError(f"secondary_scale={option!r}: choose {', '.join(_SCALE_DIVISORS)} or a positive number")
