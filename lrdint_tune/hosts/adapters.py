"""The parallel adapter of the FFN (LoRaDA-A's second half) in a ``transformers`` model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lrdint_tune.adapters import check_adapters
from lrdint_tune.adapters.bottleneck import Bottleneck
from lrdint_tune.errors import ConfigError
from lrdint_tune.hosts.architectures import HostLayer


class ParallelBottleneck(nn.Module):
    """Holds the FFN's input ``x`` from where it enters to where the adapter's output is added: in RoBERTa and BART
    these are two modules."""

    def __init__(self, adapter: Bottleneck) -> None:
        super().__init__()
        self.adapter = adapter
        self._x: Tensor | None = None

    def enter(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook where the FFN begins."""
        self._x = args[0]

    def leave(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Forward hook where it ends."""
        x, self._x = self._x, None
        assert x is not None
        return output + self.adapter(x).to(output.dtype)


def add_adapters(layers: Sequence[HostLayer], adapters: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Put adapters beside the FFN of each layer, as ``{ffn_out}.bottleneck``.

    Args:
        layers: of one model.
        adapters: None, or one ``{type: bottleneck, ...}``.

    Returns:
        ``adapters`` with every default filled in.

    Raises:
        ConfigError: another type, or a bad option.
    """
    checked = check_adapters(adapters)
    for i, entry in enumerate(checked):
        if entry["type"] != Bottleneck.name:
            raise ConfigError(
                f"adapters[{i}].type={entry['type']!r}: not for transformers models; use {Bottleneck.name}, or a model "
                "of lrdint_tune.models"
            )
    for entry in checked:
        options = {name: value for name, value in entry.items() if name != "type"}
        for layer in layers:
            weight = layer.value.weight
            with torch.device(weight.device):
                parallel = ParallelBottleneck(Bottleneck(layer.shape.embed_dim, **options)).to(weight.dtype)
            layer.ffn_out.bottleneck = parallel.train(layer.attention.training)
            layer.ffn_in.register_forward_pre_hook(partial(ParallelBottleneck.enter, parallel))
            layer.ffn_out.register_forward_hook(partial(ParallelBottleneck.leave, parallel))
    return checked
