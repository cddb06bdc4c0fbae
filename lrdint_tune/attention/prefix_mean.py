"""The prefix mean over the rows of a document, as a few small matrix products, and what DINT does with it.

A ``cumsum`` along the sequence walks ``[B, N, H, hd]`` memory in strides of a whole row, and its backward flips twice.
Cutting the sequence into blocks turns both directions into products with one small matrix per block: several times
faster, and documents and padding are entries that are 0.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 64


class PrefixMean:
    """``out[i] = 1/c_i sum of x[m] over the counted rows m <= i of i's document``; ``c_i`` is how many those
    are. Rows that are not counted themselves receive 0.

    Linear in ``x``, so its matrices are built once and serve every layer of a forward. Within a block of ``C`` rows the
    sum is a lower triangular matrix; what the block's first document had accumulated before comes from the sums of the
    earlier blocks. Entries for later rows and other documents are exact zeros: those rows change no bit of ``out[i]``.

    Args:
        starts: bool ``[B or 1, N]``, True where a document begins.
        counted: bool ``[B or 1, N]``, False for rows that no mean counts (padding); their own is 0.
        dtype: float32 or float64, of the matrices and of the sums.
    """

    def __init__(self, starts: Tensor, counted: Tensor, dtype: torch.dtype) -> None:
        starts, counted = torch.broadcast_tensors(starts, counted)
        block = min(BLOCK, starts.shape[1])
        total = counted.cumsum(1)
        before = torch.where(starts, total - counted.long(), 0).cummax(1).values  # counted rows of earlier documents
        document = _blocks(starts.cumsum(1), block)  # [B, N/C, C]
        weight = _blocks(counted.to(dtype), block)
        share = weight / _blocks(total - before, block).clamp(min=1).to(dtype)
        first, last = document[..., :1], document[..., -1:]

        def entries(allowed: Tensor) -> Tensor:
            return allowed.to(dtype)

        same = entries(document[..., :, None] == document[..., None, :])
        self.within = (same * weight[..., None, :] * share[..., :, None]).tril()  # [B, N/C, C, C]
        # A block's rows of its last document [B, N/C, 1, C] and of its first [B, N/C, C, 1]; earlier blocks that end in
        # a block's first document [B, N/C, N/C].
        self.closing = (entries(document == last) * weight)[..., None, :]
        self.opening = (entries(document == first) * share)[..., :, None]
        self.earlier = entries(first == last.transpose(1, 2)).tril(-1)

    def __call__(self, x: Tensor) -> Tensor:
        """``[B, H, N, hd]`` of ``dtype`` -> the same."""
        return _product(x, self.within, self.closing, self.opening, self.earlier)


def integral(o1: Tensor, o2: Tensor, lam: Tensor, mean: PrefixMean) -> Tensor:
    """``O1 + λ (mean(O1) - O2)``, DINT's output (docs/methods.md), with a backward written by hand.

    Autograd would keep three tensors of the outputs' size and pass over them a dozen times; here one is kept, and the
    rest is done in place. First derivatives only.

    Args:
        o1, o2: ``[B, H, N, hd]``.
        lam: broadcastable to that.
        mean: of the dtype in which ``o1`` is summed.

    Returns:
        ``[B, H, N, hd]`` in ``o1.dtype``.
    """
    return _Integral.apply(o1, o2, lam, mean.within, mean.closing, mean.opening, mean.earlier)


class _Integral(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o1: Tensor, o2: Tensor, lam: Tensor, *matrices: Tensor) -> Tensor:
        restored = _product(o1.to(matrices[0].dtype), *matrices).to(o1.dtype).sub_(o2)
        ctx.save_for_backward(restored, lam, *matrices)
        return torch.addcmul(o1, lam, restored)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        restored, lam, within, closing, opening, earlier = ctx.saved_tensors
        grad_lam = (grad * restored).sum_to_size(lam.shape)
        buffer = grad * lam
        transposed = within.mT, opening.mT, closing.mT, earlier.mT
        grad_o1 = _product(buffer.to(within.dtype), *transposed).to(grad.dtype).add_(grad)
        return grad_o1, buffer.neg_(), grad_lam, None, None, None, None


def _product(x: Tensor, within: Tensor, closing: Tensor, opening: Tensor, earlier: Tensor) -> Tensor:
    """``within x + opening (earlier (closing x))`` on blocks of rows, ``[B, H, N, hd]`` -> the same.

    The transpose has the same form: ``within^T``, and ``opening^T``, ``closing^T``, ``earlier^T`` in these places.
    """
    _, heads, n, _ = x.shape
    rows = _blocks(x.transpose(1, 2).flatten(2), within.shape[-1])  # [B, N/C, C, H hd]
    with _full_precision(x.device.type):
        accumulated = earlier @ (closing @ rows).squeeze(2)  # [B, N/C, H hd]
        # Not in place: selective activation checkpointing keeps the outputs of matrix products and reuses them.
        out = torch.addcmul(within @ rows, opening, accumulated[:, :, None])
    return out.flatten(1, 2)[:, :n].unflatten(-1, (heads, -1)).transpose(1, 2)


def _blocks(t: Tensor, block: int) -> Tensor:
    """``[B, N, ...]`` -> ``[B, N/C, C, ...]``, the last block filled up with zeros (rows counted nowhere)."""
    padding = -t.shape[1] % block
    if padding:
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, padding))
    return t.unflatten(1, (-1, block))


def _full_precision(device: str) -> AbstractContextManager[None]:
    """Autocast would run the products in 16 bits, in which a sum over thousands of rows is lost."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
