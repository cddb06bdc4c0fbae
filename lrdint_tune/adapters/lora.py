"""LoRA: a low-rank matrix beside the weight (Hu et al. 2021, arXiv:2106.09685).

DoRA is left out: it rescales the base's own output by a magnitude that starts at the norms of the loaded weight, so it
is no update that adds up with others, and its start is known only after the weights are loaded.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from lrdint_tune.adapters.base import LinearAdapter, at_least_float32
from lrdint_tune.options import dropout, flag, number, positive_int


class LoRA(LinearAdapter):
    """``y = W x + (α / r) B A x`` with ``A [r, in]`` (``a.weight``) and ``B [out, r]`` (``b.weight``).

    ``A`` is drawn as ``nn.Linear`` does and ``B`` is 0: ``B`` has a gradient at the first step, ``A`` at the second.

    Args:
        in_features, out_features: of the adapted linear layer.
        rank: ``r``.
        lora_alpha: ``α``.
        lora_dropout: on ``x``, while training.
        use_rslora: scale by ``α / sqrt(r)`` instead (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732).

    Raises:
        ConfigError: an option out of range.
    """

    name = "lora"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> None:
        super().__init__(in_features, out_features)
        positive_int("adapters.lora.rank", rank)
        number("adapters.lora.lora_alpha", lora_alpha, positive=True)
        dropout("adapters.lora.lora_dropout", lora_dropout)
        self.scale = lora_alpha / (math.sqrt(rank) if flag("adapters.lora.use_rslora", use_rslora) else rank)
        self.dropout = nn.Dropout(lora_dropout)
        self.a = nn.Linear(in_features, rank, bias=False)
        self.b = nn.Linear(rank, out_features, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.a.reset_parameters()
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        return self.scale * self.b(self.a(self.dropout(x)))

    def delta_weight(self) -> Tensor:
        dtype = at_least_float32(self.a.weight.dtype)
        return self.scale * self.b.weight.to(dtype) @ self.a.weight.to(dtype)
