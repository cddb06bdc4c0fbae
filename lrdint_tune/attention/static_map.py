"""Attention maps that no token changes (LMAM): ``n x n``, laid over ``n`` positions of every document.

Never ``N x N``: the values at those positions are gathered into slots, multiplied, and the rows put back in their
places.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lrdint_tune.attention.layout import Layout

ALIGNMENTS = ("start", "end")


class _Places(NamedTuple):
    """Where a map lies in each document.

    begin: int64 ``[B or 1, docs]``, the key at the map's position 0. end: the key after the document's last.
    document: int64 ``[B or 1, N]``, each row's document. position: ``[B or 1, N]``, its place in the map, outside
    ``0 .. n-1`` for rows that have none.
    """

    begin: Tensor
    end: Tensor
    document: Tensor
    position: Tensor


def attend_static(
    maps: Tensor, v: Tensor, layout: Layout, *, num_heads: int, alignment: str, softmax: bool = False
) -> Tensor:
    """``tril(map) v`` on ``n`` positions of each document (seed 004 eq. 10-13), 0 elsewhere; ``map v`` in an encoder.

    Query head ``j`` uses map ``j mod H_s``. Positions count from the document's first row (``alignment: start``), or
    such that they end with its last (``end``; a document shorter than ``n`` fills the first positions either way).

    Args:
        maps: ``[H_s, n, n]``; ``H_s`` divides ``H``.
        v: ``[B, K, M, hd]``.
        layout: documents and padding; a document is taken to be without gaps.
        num_heads: ``H``.
        alignment: ``start | end``.
        softmax: replace each map by the softmax of its rows over the positions up to their own (in an encoder: of the
            document).

    Returns:
        ``[B, H, N, hd]`` in ``v.dtype``.
    """
    b, kv_heads, _, _ = v.shape
    n = min(maps.shape[-1], layout.longest_document)  # positions that no document reaches
    maps = maps[:, :n, :n]
    places = _places(layout, n, alignment)
    slots = places.begin[..., None] + torch.arange(n, device=v.device)  # [B, docs, n]
    held = (slots < places.end[..., None]).expand(b, -1, -1)
    if layout.causal:
        future = torch.ones(n, n, dtype=torch.bool, device=maps.device).triu(1)
        maps = maps.masked_fill(future, float("-inf")).softmax(-1) if softmax else maps.masked_fill(future, 0.0)
    elif softmax:  # a row sees the whole document, and nothing behind it
        hidden = ~held[:, :, None, None]
        maps = maps.masked_fill(hidden, torch.finfo(maps.dtype).min).softmax(-1)  # [B, docs, H_s, n, n]
    maps = _per_head(maps, num_heads).to(v.dtype)  # [H, n, n], or [B, docs, H, n, n]

    batch = torch.arange(b, device=v.device)[:, None, None]
    values = v.transpose(1, 2)[batch, slots.clamp(max=v.shape[2] - 1).expand(b, -1, -1)]  # [B, docs, n, K, hd]
    values = values.masked_fill(~held[..., None, None], 0.0).repeat_interleave(num_heads // kv_heads, dim=3)
    if maps.dim() == 5:
        out = torch.einsum("bdhij,bdjhe->bdihe", maps, values)  # [B, docs, n, H, hd]
    else:  # all documents are columns of one product per head, or the maps would be repeated for each of them
        columns = values.permute(3, 2, 0, 1, 4)  # [H, n, B, docs, hd]
        out = (maps @ columns.flatten(2)).view(columns.shape).permute(2, 3, 1, 0, 4)

    has_place = ((places.position >= 0) & (places.position < n) & layout.counted).expand(b, -1)
    position = places.position.clamp(0, n - 1).expand(b, -1)
    rows = out[batch[..., 0], places.document.expand(b, -1), position]  # [B, N, H, hd]
    return rows.masked_fill(~has_place[..., None, None], 0.0).transpose(1, 2)


def static_bias(maps: Tensor, layout: Layout, *, num_heads: int, alignment: str) -> Tensor:
    """The maps as a dense ``[B or 1, H, N, M]``, 0 where a row or a key has no position; arguments as
    :func:`attend_static`."""
    n = maps.shape[-1]
    places = _places(layout, n, alignment)
    row = places.position  # [B, N]
    begin = places.begin.gather(1, places.document)  # [B, N]
    key = torch.arange(layout.num_keys, device=maps.device) - begin[..., None]  # [B, N, M]
    inside = ((row >= 0) & (row < n))[..., None] & (key >= 0) & (key < n)
    dense = _per_head(maps, num_heads)[:, row.clamp(0, n - 1)[..., None], key.clamp(0, n - 1)]  # [H, B, N, M]
    return dense.masked_fill(~inside, 0.0).transpose(0, 1)


def _per_head(maps: Tensor, num_heads: int) -> Tensor:
    """``[..., H_s, n, n]`` -> ``[..., H, n, n]``."""
    return maps.repeat(*[1] * (maps.dim() - 3), num_heads // maps.shape[-3], 1, 1)


def _places(layout: Layout, n: int, alignment: str) -> _Places:
    documents = layout.documents_of_rows
    begin = documents.begin
    if alignment == "end":
        begin = torch.maximum(begin, documents.end - n)
    rows = torch.arange(layout.num_queries, device=layout.device) + layout.offset
    return _Places(begin, documents.end, documents.of_row, rows - begin.gather(1, documents.of_row))
