"""What an adapter is: a child of the module it adapts, whose output is added to that module's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn


class Adapter(nn.Module, ABC):
    """Base of all adapters. A subclass's keyword-only constructor arguments are its options.

    Every adapter starts as 0, so that the pretrained function is unchanged at step 0, and each of its tensors has a
    gradient within two optimizer steps.

    Attributes:
        name: the registry's and the config's name, and the adapter's name among the module's ``adapters``.
    """

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def for_module(cls, module: nn.Module, **options: Any) -> Adapter:
        """The adapter that fits ``module``."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The update: what is added to the output of the adapted module for its input ``x``, both ``[..., features]``
        in ``x.dtype``."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialise every tensor; called again after a meta-device module has been given memory."""

    @property
    def products_per_token(self) -> int:
        """Multiplications of a forward pass per token."""
        return sum(p.numel() for p in self.parameters() if p.dim() >= 2)


class LinearAdapter(Adapter):
    """An adapter of an ``nn.Linear`` that is itself a matrix, so that it can be merged into the weight."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features

    @classmethod
    def for_module(cls, module: nn.Module, **options: Any) -> LinearAdapter:
        return cls(cast(int, module.in_features), cast(int, module.out_features), **options)

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """``[out_features, in_features]``, at least float32: without dropout, ``forward(x) = x delta_weight^T``."""


def attach(module: nn.Module, name: str, adapter: Adapter) -> None:
    """Make ``adapter`` a child of ``module``: ``{module}.adapters.{name}`` in the state dict. Updates add up.

    The names of the module's own parameters stay as they are. Whatever replaces modules (a conversion to fp8) comes
    before: it would leave the adapters behind.

    Raises:
        RuntimeError: the module has an adapter of that name, or its adapters are merged.
    """
    if hasattr(module, "unmerged"):
        raise RuntimeError("the module's adapters are merged; call unmerge_adapters() first")
    if not hasattr(module, "adapters"):
        module.adapters = nn.ModuleDict()
        module.register_forward_hook(_add_updates)
    if name in attached(module):
        raise RuntimeError(f"the module has an adapter {name!r} already")
    attached(module)[name] = adapter


def attached(module: nn.Module) -> nn.ModuleDict:
    """The adapters of ``module`` itself by name; empty for a module without any."""
    adapters = getattr(module, "adapters", None)
    return adapters if isinstance(adapters, nn.ModuleDict) else nn.ModuleDict()


# A function of the module, not a closure over one module's adapters: a copied model's hook finds the copied adapters.
def _add_updates(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    for adapter in cast(nn.ModuleDict, module.adapters).values():
        output = output + adapter(args[0])
    return output


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
