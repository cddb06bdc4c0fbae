"""How many bytes running code holds at each moment, counted on the meta device, where nothing is allocated."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages under ``tensors``; of a tensor subclass, those of what it wraps."""
    storages = {}
    for tensor in tensors:
        for inner in _inner(tensor):
            storage = inner.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _inner(tensor: Tensor) -> list[Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _inner(getattr(tensor, name))]


class Held(TorchDispatchMode):
    """Counts the bytes of all storages that operations under it have made and that are still referenced.

    Args:
        outside: tensors made before, not to be counted.
        trained: parameters whose gradients are counted apart.

    Attributes:
        now: bytes held.
        peak: the most held since :meth:`restart`, with the scratch memory inside torch's kernels.
        gradients_at_peak: how much of that were gradients of ``trained``.
    """

    supports_higher_order_operators = True

    def __init__(self, outside: Iterable[Tensor], trained: Iterable[nn.Parameter] = ()) -> None:
        super().__init__()
        self._outside = [tensor.untyped_storage() for tensor in outside]  # held, so that no other takes their ids
        self._known = {id(storage) for storage in self._outside}
        self._trained = list(trained)
        self.now = self.peak = self.gradients_at_peak = 0

    def restart(self) -> None:
        """Forget the peak."""
        self.peak, self.gradients_at_peak = self.now, self.gradients()

    def gradients(self) -> int:
        return storage_bytes(p.grad for p in self._trained if p.grad is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        scratch = _SCRATCH.get(func)
        held = self.now + (scratch(*args) if scratch else 0)
        if held > self.peak:
            self.peak, self.gradients_at_peak = held, self.gradients()
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _flash_backward(grad: Tensor, q: Tensor, *_: Any) -> int:
    return q.numel() * 4  # the gradient of the queries is summed in float32


# What kernels allocate inside, where no dispatch mode sees it.
_SCRATCH: dict[Any, Callable[..., int]] = {
    aten.logsumexp.default: lambda x, *_: _bytes(x),  # x - max(x)
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention_backward.default: _flash_backward,
}


class Kernels(TorchFunctionMode):
    """Replaces what torch computes differently on the meta device by the kernels of a real one.

    On meta tensors attention would be the ``N x N`` formula and the RMS norm its single steps.

    Args:
        device: ``cpu`` or ``cuda``.
        flex: whether attention runs as FlexAttention, which selective checkpointing does not keep.
    """

    def __init__(self, device: str, *, flex: bool) -> None:
        super().__init__()
        self.device, self.flex = device, flex

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is nn.functional.rms_norm and self.device == "cuda":
            return self._rms_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if self.device == "cpu":
            if attn_mask is not None and attn_mask.requires_grad:  # not fused there either
                return nn.functional.scaled_dot_product_attention(
                    q, k, v, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
                )
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                attn_mask = torch.empty_like(attn_mask, dtype=q.dtype)  # it becomes what is added to the logits
            return aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, is_causal=is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        if self.flex:
            return _Fused.apply(q, k, v)
        if attn_mask is None and q.dtype == torch.bfloat16:
            return aten._scaled_dot_product_flash_attention(q, k, v, is_causal=is_causal, scale=scale)[0]
        groups = q.shape[1] // k.shape[1]  # this kernel wants a key for every query head
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if attn_mask is not None:
            attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
        return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, is_causal=is_causal, scale=scale)[
            0
        ]

    @staticmethod
    def _rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        if weight is None or weight.dtype != x.dtype:  # not fused on a GPU either, which torch warns of
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                return torch.rms_norm(x, normalized_shape, weight, eps)
        return _FusedNorm.apply(x, weight)


class _FusedNorm(torch.autograd.Function):
    """Keeps its input and a float32 per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _Fused(torch.autograd.Function):
    """A fused attention kernel: keeps its inputs, its output and a float32 per row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
