"""Parallel bottleneck adapter on the MLP (He et al. 2022, arXiv:2110.04366, which seed 004 cites as Adapter-FFN)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrdint_tune import options
from lrdint_tune.adapters.base import Adapter


class Bottleneck(Adapter):
    """``FFN(x) + s up(ReLU(down(x)))``, ``x`` being the FFN's input (after its norm).

    Both layers have biases, as in the cited work. Its initialisation too: ``down.weight`` as ``nn.Linear`` draws it,
    ``up`` and the biases 0. ``up`` has a gradient at the first step, ``down`` at the second. Not linear: it cannot be
    merged.

    Args:
        embed_dim: ``D``, the FFN's input and output.
        rank: the width of the bottleneck.
        scale: ``s`` (seed 004: 4 for language models, 2 on GLUE).
        dropout: after the ReLU, while training.

    Raises:
        ConfigError: an option out of range.
    """

    name = "bottleneck"

    def __init__(self, embed_dim: int, *, rank: int = 16, scale: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        options.positive_int("adapters.bottleneck.rank", rank)
        options.number("adapters.bottleneck.scale", scale, positive=True)
        options.dropout("adapters.bottleneck.dropout", dropout)
        self.scale = scale
        self.down = nn.Linear(embed_dim, rank)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(rank, embed_dim)
        self.reset_parameters()

    @classmethod
    def for_module(cls, module: nn.Module, **options: Any) -> Bottleneck:
        """``module`` is torchtune's ``FeedForward``."""
        return cls(module.get_submodule("w1").in_features, **options)  # type: ignore[arg-type]  # an int

    def reset_parameters(self) -> None:
        self.down.reset_parameters()
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` -> ``[..., D]``."""
        return self.scale * self.up(self.dropout(torch.relu(self.down(x))))
