"""Adapters for tiny models: every type, on every kind of module, with sizes that divide nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lrdint_tune.adapters import TARGETS, named_adapters

LINEAR: list[dict[str, Any]] = [
    {"type": "lora", "target_modules": list(TARGETS), "rank": 3, "lora_alpha": 5},
    # Wider than some inputs (24, 32), narrower and wider than the outputs (16 ... 40).
    {"type": "quanta", "target_modules": list(TARGETS), "dims": [3, 4, 4]},
]
ALL: list[dict[str, Any]] = [*LINEAR, {"type": "bottleneck", "rank": 5, "scale": 2.0}]
EACH: dict[str, list[dict[str, Any]]] = {
    "lora": LINEAR[:1],
    "rslora": [{**LINEAR[0], "use_rslora": True}],
    "quanta": LINEAR[1:],
    "bottleneck": ALL[2:],
    "all": ALL,
}


def wake_adapters(model: nn.Module, std: float = 0.05) -> None:
    """Random numbers in every adapter's tensors: an adapter at its start adds nothing."""
    with torch.no_grad():
        for _, adapter in named_adapters(model):
            for parameter in adapter.parameters():
                parameter.normal_(std=std)
