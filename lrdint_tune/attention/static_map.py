"""Attention maps that no token changes (LMAM): ``n x n``, laid over ``n`` positions of every document.

Never ``N x N``: the values at those positions are gathered, multiplied, and the products put into their rows. Documents
shorter than ``n`` take only the corner of the map that they fill.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrdint_tune.attention.layout import DocumentMask, Layout, LengthGroup

ALIGNMENTS = ("start", "end")


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
    b, kv_heads, m, _ = v.shape
    n = maps.shape[-1]
    if layout.causal:
        future = torch.ones(n, n, dtype=torch.bool, device=maps.device).triu(1)
        maps = maps.masked_fill(future, float("-inf")).softmax(-1) if softmax else maps.masked_fill(future, 0.0)
    by_key = v.transpose(1, 2)  # [B, M, K, hd]
    out = v.new_zeros(b, layout.num_queries, num_heads, v.shape[-1])
    for documents, positions in length_groups(layout, b, n):
        batch, first, end = documents.unbind(1)  # [T]
        begin = _aligned(first, end, n, alignment)
        keys = begin[:, None] + torch.arange(positions, device=v.device)  # [T, positions]
        held = keys < end[:, None]
        values = by_key[batch[:, None], keys.clamp(max=m - 1)].masked_fill(~held[..., None, None], 0.0)
        values = values.repeat_interleave(num_heads // kv_heads, dim=2)  # [T, positions, H, hd]
        corner = maps[:, :positions, :positions]
        rows = keys - layout.offset
        if layout.num_queries < positions and len(batch) == b:  # decoding: one document a sequence, few of its rows
            rows, held, corner = _rows_of_call(corner, begin, end, layout)
            products = torch.einsum("thij,tjhe->tihe", _per_head(corner, num_heads).to(v.dtype), values)
        elif softmax and not layout.causal:  # a row sees the whole document, and nothing behind it
            corner = corner.masked_fill(~held[:, None, None], torch.finfo(maps.dtype).min).softmax(-1)
            products = torch.einsum("thij,tjhe->tihe", _per_head(corner, num_heads).to(v.dtype), values)
        else:  # all documents are columns of one product per head, or the maps would be repeated for each of them
            columns = values.permute(2, 1, 0, 3)  # [H, positions, T, hd]
            products = _per_head(corner, num_heads).to(v.dtype) @ columns.flatten(2)
            products = products.view(columns.shape).permute(2, 1, 0, 3)
        held = held & (rows >= 0) & (rows < layout.num_queries)
        rows = rows.clamp(0, layout.num_queries - 1)
        # Every row is met once; what is added beside is 0.
        out = out.index_put(
            (batch[:, None].expand_as(rows), rows), products.masked_fill(~held[..., None, None], 0.0), accumulate=True
        )
    if layout.shard is not None:
        # Where no row of this process has a position the maps still take part: every process must have a gradient.
        out = out + 0.0 * maps[0, 0, 0].to(v.dtype)
    return out.masked_fill(~layout.counted[..., None, None], 0.0).transpose(1, 2)


def _rows_of_call(maps: Tensor, begin: Tensor, end: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of this call ``[T, N]``, which of them have a place in the map, and their rows of it ``[T, H_s, N,
    positions]``."""
    rows = torch.arange(layout.num_queries, device=begin.device).expand(len(begin), -1)
    keys = rows + layout.offset
    place = keys - begin[:, None]
    held = (place >= 0) & (place < maps.shape[-1]) & (keys < end[:, None])
    return rows, held, maps[:, place.clamp(0, maps.shape[-1] - 1)].transpose(0, 1)


def length_groups(layout: Layout, batch_size: int, n: int) -> list[LengthGroup]:
    """The documents of the batch, those of about one length together where lengths are known without asking the
    device: a short document then does not cost ``n`` positions. Found once for all layers."""
    if layout.documents is not None and n not in layout.length_groups:
        layout.length_groups[n] = _group(layout, layout.documents, n, ratio=2)
    if n in layout.length_groups:
        return layout.length_groups[n]
    documents = layout.documents_of_rows
    begin, end = (limit.expand(batch_size, -1) for limit in documents[1:])
    batch = torch.arange(batch_size, device=begin.device)[:, None].expand_as(begin)
    return [LengthGroup(torch.stack([batch, begin, end], dim=-1).flatten(0, 1), min(n, layout.num_keys))]


def prepare(layout: Layout, n: int) -> None:
    """Group the documents for compiled layers, whose code then is the same for every batch: no group is left out, so
    there are fewer, and none has a size that a compiler would take for a constant."""
    if layout.documents is not None:
        layout.length_groups[n] = _group(layout, layout.documents, n, ratio=4, at_least=2)
        for documents, _ in layout.length_groups[n]:
            torch._dynamo.maybe_mark_dynamic(documents, 0)


def _group(layout: Layout, documents: DocumentMask, n: int, *, ratio: int, at_least: int = 0) -> list[LengthGroup]:
    """Groups of ``n`` positions, ``n / ratio`` and so on; filled up to ``at_least`` documents with empty ones."""
    sizes = [min(n, documents.num_tokens)]
    while sizes[-1] > ratio:
        sizes.append(-(-sizes[-1] // ratio))
    groups: dict[int, list[tuple[int, int, int]]] = {positions: [] for positions in sizes}
    for row, spans in enumerate(documents.spans()):
        for begin, end in spans:
            # Of a sequence shared by several processes this one may have no row at the map's positions.
            if end <= layout.offset or begin + n <= layout.offset or begin >= layout.num_keys:
                continue
            groups[min((p for p in sizes if p >= end - begin), default=sizes[0])].append((row, begin, end))
    for found in groups.values():
        found += [(0, 0, 0)] * (at_least - len(found))
    return [
        LengthGroup(torch.tensor(found, device=layout.device), positions)
        for positions, found in groups.items()
        if found
    ]


def _aligned(begin: Tensor, end: Tensor, n: int, alignment: str) -> Tensor:
    """The key at the map's position 0."""
    return begin if alignment == "start" else torch.maximum(begin, end - n)


def _per_head(maps: Tensor, num_heads: int) -> Tensor:
    """``[..., H_s, i, j]`` -> ``[..., H, i, j]``."""
    return maps.repeat(*[1] * (maps.dim() - 3), num_heads // maps.shape[-3], 1, 1)


def static_bias(maps: Tensor, layout: Layout, *, num_heads: int, alignment: str) -> Tensor:
    """The maps as a dense ``[B or 1, H, N, M]``, 0 where a row or a key has no position; arguments as
    :func:`attend_static`."""
    n = maps.shape[-1]
    documents = layout.documents_of_rows
    begin = (_aligned(documents.begin, documents.end, n, alignment)).gather(1, documents.of_row)  # [B, N]
    row = torch.arange(layout.num_queries, device=maps.device) + layout.offset - begin
    key = torch.arange(layout.num_keys, device=maps.device) - begin[..., None]  # [B, N, M]
    inside = ((row >= 0) & (row < n))[..., None] & (key >= 0) & (key < n)
    dense = _per_head(maps, num_heads)[:, row.clamp(0, n - 1)[..., None], key.clamp(0, n - 1)]  # [H, B, N, M]
    return dense.masked_fill(~inside, 0.0).transpose(0, 1)
