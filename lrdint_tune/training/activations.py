"""What is kept of a forward pass for its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lrdint_tune.errors import ConfigError
from lrdint_tune.models.decoder import LlamaDecoder

_SAVED_OPS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
]


def checkpoint_activations(model: LlamaDecoder, mode: str, every: int | None = None) -> None:
    """Recompute blocks in the backward pass instead of keeping their activations.

    ``full`` keeps only each block's input; ``every_k`` does so in every ``every``-th block and keeps all of the others;
    ``selective`` also keeps the outputs of matrix multiplications and of torch's fused attention kernels, which are the
    expensive ones to recompute (FlexAttention only where the whole block is compiled). Only ``forward`` is replaced, so
    parameter names stay as they are and FSDP2's hooks stay outside.

    Raises:
        ConfigError: ``every`` is larger than the number of blocks.
    """
    step = every or 1
    if step > len(model.layers):
        raise ConfigError(f"ac_option={every}: the model has {len(model.layers)} blocks, none would be checkpointed")
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _SAVED_OPS)
    for layer in list(model.layers)[step - 1 :: step]:
        layer.forward = MethodType(_checkpointed(type(layer).forward, options), layer)


def _checkpointed(forward: Callable[..., Tensor], options: dict[str, Any]) -> Callable[..., Tensor]:
    """A function of the block, not of one block: compiled, it is the same code for all of them."""

    def recomputed(layer: nn.Module, x: Tensor, **inputs: Any) -> Tensor:
        return checkpoint(lambda x: forward(layer, x, **inputs), x, **options)

    return recomputed
