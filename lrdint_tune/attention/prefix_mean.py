"""The prefix mean over the rows of a document, as a few small matrix products.

A ``cumsum`` along the sequence walks ``[B, N, H, hd]`` memory in strides of a whole row, and its backward flips twice.
Cutting the sequence into blocks turns both directions into products with one small matrix per block: several times
faster, and documents and padding are entries that are 0.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

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
        self.block = min(BLOCK, starts.shape[1])
        self.padding = -starts.shape[1] % self.block

        total = counted.cumsum(1)
        before = torch.where(starts, total - counted.long(), 0).cummax(1).values  # counted rows of earlier documents
        document = self._blocks(starts.cumsum(1))  # [B, N/C, C]
        weight = self._blocks(counted.to(dtype))
        share = weight / self._blocks(total - before).clamp(min=1).to(dtype)
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
        _, heads, n, _ = x.shape
        rows = self._blocks(x.transpose(1, 2).flatten(2))  # [B, N/C, C, H hd]
        with _full_precision(x.device.type):
            accumulated = self.earlier @ (self.closing @ rows).squeeze(2)  # [B, N/C, H hd]
            mean = torch.addcmul(self.within @ rows, self.opening, accumulated[:, :, None])
        return mean.flatten(1, 2)[:, :n].unflatten(-1, (heads, -1)).transpose(1, 2)

    def _blocks(self, t: Tensor) -> Tensor:
        """``[B, N, ...]`` -> ``[B, N/C, C, ...]``, the last block filled up with zeros (rows counted nowhere)."""
        if self.padding:
            t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, self.padding))
        return t.unflatten(1, (-1, self.block))


def _full_precision(device: str) -> AbstractContextManager[None]:
    """Autocast would run the products in 16 bits, in which a sum over thousands of rows is lost."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
