"""How spread out the rows of an attention map are, without keeping the map."""

from __future__ import annotations

import torch
from torch import Tensor

from lrdint_tune.attention.layout import Layout

ROWS = 256  # logits of this many rows at a time


@torch.no_grad()
def mean_row_entropy(q: Tensor, k: Tensor, layout: Layout, *, scale: float) -> Tensor:
    """``-sum_j A[i, j] ln A[i, j]`` of ``A = softmax(q k^T * scale)``, averaged over the rows that see a key.

    Args:
        q: ``[B, H, N, hd]``.
        k: ``[B, K, M, hd]``.
        layout: the mask (no ``BlockMask``).
        scale: multiplier of the logits.

    Returns:
        float32 ``[H]``, in nats. Of a sequence shared by several processes each returns its rows' part of that mean:
        they add up to it.
    """
    b, h, n, hd = q.shape
    groups = k.shape[1]
    dense = layout.dense[:, 0]  # [B or 1, N, M]
    counted = layout.counted.expand(b, n)
    total = torch.zeros(h, dtype=torch.float32, device=q.device)
    for begin in range(0, n, ROWS):
        rows = slice(begin, begin + ROWS)
        grouped = q[:, :, rows].float().reshape(b, groups, -1, hd)
        logits = (grouped @ k.float().transpose(-1, -2) * scale).view(b, h, -1, k.shape[2])
        log_weights = logits.masked_fill(~dense[:, None, rows], float("-inf")).log_softmax(-1)
        entropy = torch.special.entr(log_weights.exp()).sum(-1)  # [B, H, rows]
        total += (entropy * counted[:, None, rows]).sum((0, 2))
    rows_counted = counted.sum()
    if layout.shard is not None:
        rows_counted = layout.shard.sum(rows_counted)
    return total / rows_counted.clamp(min=1)
