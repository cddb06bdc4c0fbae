"""The prefix mean over the rows of a document, as a few small matrix products, and what DINT does with it.

A ``cumsum`` along the sequence walks ``[B, N, H, hd]`` memory in strides of a whole row, and its backward flips twice.
Cutting the sequence into blocks turns both directions into products with one small matrix per block: several times
faster, and documents and padding are entries that are 0.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrdint_tune.attention.sequence_shard import SequenceShard

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
        shard: None, or whose rows these are: a document that began on an earlier process brings its sum and its count
            along.
    """

    def __init__(self, starts: Tensor, counted: Tensor, dtype: torch.dtype, shard: SequenceShard | None = None) -> None:
        starts, counted = torch.broadcast_tensors(starts, counted)
        block = min(BLOCK, starts.shape[1])
        total = counted.cumsum(1)
        before = torch.where(starts, total - counted.long(), 0).cummax(1).values  # counted rows of earlier documents
        count = total - before
        self.carry = None
        if shard is not None:
            self.carry, carried = _carry(starts, counted, dtype, shard)
            count = count + carried
        document = _blocks(starts.cumsum(1), block)  # [B, N/C, C]
        weight = _blocks(counted.to(dtype), block)
        share = weight / _blocks(count, block).clamp(min=1).to(dtype)
        if self.carry is not None:
            self.carry.opening.mul_(share.flatten(1, 2)[:, : starts.shape[1], None])
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
        return _product(x, self.carry, self.within, self.closing, self.opening, self.earlier)


class Carry(NamedTuple):
    """How the sums of documents that lie on several processes add up.

    closing: ``[B, 1, N]``, the counted rows of this process's last document. opening: ``[B, N, 1]``, the share of a
    carried sum in the mean of each row. earlier: ``[B, P, P]``, whether process ``q``'s last document goes on in
    process ``p``. shard: which of them this is.
    """

    closing: Tensor
    opening: Tensor
    earlier: Tensor
    shard: SequenceShard

    @property
    def transposed(self) -> Carry:
        return Carry(self.opening.mT, self.closing.mT, self.earlier.mT, self.shard)


def _carry(starts: Tensor, counted: Tensor, dtype: torch.dtype, shard: SequenceShard) -> tuple[Carry, Tensor]:
    """The carry, its ``opening`` still without the share, and int64 ``[B, N]``: how many rows each row's count must be
    raised by."""
    index = starts.cumsum(1)
    closing = counted & (index == index[:, -1:])
    facts = torch.stack([closing.sum(1), index[:, -1]], dim=1)[:, None]  # [B, 1, 2]
    counts, begun = shard.gather(facts, 1).unbind(-1)  # [B, P]
    # Process q's last document reaches p > q if none begins in between: as many had begun when p came as when q ended.
    ended = begun.cumsum(1)
    came = ended - begun
    earlier = (came[:, :, None] == ended[:, None, :]).tril(-1)
    opening = index == 0
    carried = (earlier[:, shard.rank] * counts).sum(1, keepdim=True)
    carry = Carry(closing.to(dtype)[:, None], opening.to(dtype)[..., None], earlier.to(dtype), shard)
    return carry, opening * carried


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
    return _Integral.apply(o1, o2, lam, mean.carry, mean.within, mean.closing, mean.opening, mean.earlier)


class _Integral(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o1: Tensor, o2: Tensor, lam: Tensor, carry: Carry | None, *matrices: Tensor) -> Tensor:
        restored = _product(o1.to(matrices[0].dtype), carry, *matrices).to(o1.dtype).sub_(o2)
        ctx.carry = carry
        ctx.save_for_backward(restored, lam, *matrices)
        return torch.addcmul(o1, lam, restored)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        restored, lam, within, closing, opening, earlier = ctx.saved_tensors
        buffer = grad * restored
        grad_lam = buffer.sum_to_size(lam.shape)
        # A compiler finds the memory itself, and does not take `out`.
        buffer = grad * lam if torch.compiler.is_compiling() else torch.mul(grad, lam, out=buffer)
        transposed = within.mT, opening.mT, closing.mT, earlier.mT
        carry = None if ctx.carry is None else ctx.carry.transposed
        grad_o1 = _product(buffer.to(within.dtype), carry, *transposed).to(grad.dtype).add_(grad)
        return grad_o1, buffer.neg_(), grad_lam, None, None, None, None, None


def _product(
    x: Tensor, carry: Carry | None, within: Tensor, closing: Tensor, opening: Tensor, earlier: Tensor
) -> Tensor:
    """``within x + opening (earlier (closing x))`` on blocks of rows, ``[B, H, N, hd]`` -> the same; and once more with
    processes in the place of blocks, if there is a ``carry``.

    The transpose has the same form: ``within^T``, and ``opening^T``, ``closing^T``, ``earlier^T`` in these places.
    """
    _, heads, n, _ = x.shape
    flat = x.transpose(1, 2).flatten(2)  # [B, N, H hd]
    rows = _blocks(flat, within.shape[-1])  # [B, N/C, C, H hd]
    with _full_precision(x.device.type):
        accumulated = earlier @ (closing @ rows).squeeze(2)  # [B, N/C, H hd]
        # Not in place: selective activation checkpointing keeps the outputs of matrix products and reuses them.
        out = torch.addcmul(within @ rows, opening, accumulated[:, :, None])
        out = out.flatten(1, 2)[:, :n]
        if carry is not None:
            sums = carry.shard.gather(carry.closing @ flat, 1)  # [B, P, H hd]
            out = torch.addcmul(out, carry.opening, carry.earlier[:, carry.shard.rank, None] @ sums)
    return out.unflatten(-1, (heads, -1)).transpose(1, 2)


def _blocks(t: Tensor, block: int) -> Tensor:
    """``[B, N, ...]`` -> ``[B, N/C, C, ...]``, the last block filled up with zeros (rows counted nowhere)."""
    padding = -t.shape[1] % block
    if padding:
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, padding))
    return t.unflatten(1, (-1, block))


def _full_precision(device: str) -> AbstractContextManager[None]:
    """Autocast would run the products in 16 bits, in which a sum over thousands of rows is lost."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
