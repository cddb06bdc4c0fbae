"""Folding linear adapters into the weights they adapt, and back."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from lrdint_tune.adapters.base import LinearAdapter, at_least_float32, attached
from lrdint_tune.errors import ConfigError


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add every adapter to the weight it adapts; the state dict is then the plain model's.

    The sum is computed in float32 (float64 for float64 weights) and rounded once to the weight's dtype. Dropout has no
    part in it, nor in the merged model. What was replaced is kept beside the weight for :func:`unmerge_adapters`.

    Args:
        model: whole, not sharded. Without adapters, nothing is done.

    Raises:
        ConfigError: an adapter is not linear; nothing was merged.
    """
    adapted = [(name, module) for name, module in model.named_modules() if attached(module)]
    for name, module in adapted:
        for kind, adapter in attached(module).items():
            if not isinstance(adapter, LinearAdapter):
                raise ConfigError(
                    f"adapters.{kind}: {name} has an adapter that is not linear and cannot be merged; keep the model "
                    "unmerged"
                )
    for _, module in adapted:
        weight = cast(Tensor, module.weight)
        merged = weight.to(at_least_float32(weight.dtype))
        for adapter in attached(module).values():
            merged = merged + cast(LinearAdapter, adapter).delta_weight()
        # In a tuple, so that neither is part of the state dict.
        module.unmerged = (weight.detach().clone(), attached(module))
        module.adapters = nn.ModuleDict()
        weight.copy_(merged)


@torch.no_grad()
def unmerge_adapters(model: nn.Module) -> None:
    """Undo :func:`merge_adapters`: the weights come back bit for bit, the adapters as they were. Without merged
    adapters, nothing is done."""
    for module in list(model.modules()):
        if hasattr(module, "unmerged"):
            weight, adapters = cast(tuple[Tensor, nn.ModuleDict], module.unmerged)
            cast(Tensor, module.weight).copy_(weight)
            module.adapters = adapters
            del module.unmerged


def is_merged(model: nn.Module) -> bool:
    """Whether :func:`merge_adapters` folded adapters into the weights."""
    return any(hasattr(module, "unmerged") for module in model.modules())
