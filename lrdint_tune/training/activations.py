"""What is kept of a forward pass for its backward pass."""

from __future__ import annotations

from collections import defaultdict, deque
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from lrdint_tune.models.decoder import LlamaDecoder

_SAVED_OPS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.higher_order.flex_attention,
    }
)


def checkpoint_activations(model: LlamaDecoder, mode: str) -> None:
    """Recompute each block in the backward pass instead of keeping its activations.

    ``full`` keeps only the block's input; ``selective`` also keeps the outputs of matrix multiplications and of torch's
    fused attention kernels, which are the expensive ones to recompute (a compiled FlexAttention is recomputed). Only
    ``forward`` is replaced, so parameter names stay as they are and FSDP2's hooks stay outside.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = _keep_expensive
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, **options)


def _keep_expensive() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The contexts of a block's forward pass and of its recomputation.

    torch's own ``create_selective_checkpoint_contexts`` wants every operation of the forward pass to come again in the
    same number. With FSDP2 inside the block (the λ) that is not so: its hooks do less when the recomputation runs.
    """
    kept: dict[Any, deque[Any]] = defaultdict(deque)
    return _Keep(kept), _Reuse(kept)


class _Keep(TorchDispatchMode):
    """Keeps the outputs of the expensive operations, in order."""

    supports_higher_order_operators = True

    def __init__(self, kept: dict[Any, deque[Any]]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _SAVED_OPS:
            # Detached: autograd is about to write its graph, which holds this store, into the tensor itself.
            self.kept[func].append(tree_map_only(Tensor, torch.detach, out))
        return out


class _Reuse(_Keep):
    """Gives them back instead of computing them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SAVED_OPS:
            return self.kept[func].popleft()
        return func(*args, **(kwargs or {}))
