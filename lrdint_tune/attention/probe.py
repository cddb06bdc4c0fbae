"""A method's effective map ``M`` (``out = M v``), some rows at a time: what it attends to, without an ``N x N`` map.

The method's own formula is run with the identity in place of the values, ``M = M I``: whatever ``forward`` computes
from outputs of ``attend`` it then computes from rows of maps. A block of rows is run as decoding runs it, with the keys
and the running mean of earlier rows remembered, so nothing is computed twice and ``rows x N x H`` numbers exist at a
time. Only the literal integral, whose rows depend on all later ones, goes through the rows once before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lrdint_tune.attention.cache import AttentionCache
from lrdint_tune.attention.context import AttentionContext
from lrdint_tune.attention.core import Backend, RunningState, integral
from lrdint_tune.attention.layout import Layout
from lrdint_tune.attention.self_attention import DifferentialSelfAttention

ROWS = 64


class MapRows(NamedTuple):
    """Rows ``begin`` to ``begin + R`` of a layer's maps; float32, or float64 of a float64 model.

    effective: ``M``, ``[B, H, R, N]``. first: ``A1``, likewise. allowed: bool ``[B or 1, R, N]``, the keys that the
    mask allows. begin: the first row. counted: bool ``[B or 1, R]``, False for padding, whose rows are 0. first_key:
    int64 ``[B or 1, R]``, where each row's document begins.
    """

    effective: Tensor
    first: Tensor
    allowed: Tensor
    begin: int
    counted: Tensor
    first_key: Tensor


@torch.no_grad()
def map_rows(attention: DifferentialSelfAttention, x: Tensor, layout: Layout, *, rows: int = ROWS) -> Iterator[MapRows]:
    """The rows of the map of one layer in order, ``rows`` at a time. Its diagnostics are switched off.

    Args:
        attention: the layer.
        x: ``[B, N, D]``, its input.
        layout: the mask of the whole sequences; no ``BlockMask``.
        rows: how many at a time.

    Raises:
        ValueError: ``layout`` is not that of whole sequences.
    """
    attention.method.enable_diagnostics(False)
    yield from _Maps(attention, x, layout, rows).blocks()


class _Maps:
    """Goes through one layer's rows, and remembers what later ones need."""

    def __init__(
        self, attention: DifferentialSelfAttention, x: Tensor, layout: Layout, rows: int, *, literal: bool = True
    ) -> None:
        self.attention, self.x, self.layout, self.rows = attention, x, layout, rows
        self.literal = literal
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        b, n, _ = x.shape
        heads = attention.num_heads
        with torch.device(x.device):
            self.cache = AttentionCache(
                batch_size=b,
                max_seq_len=n,
                num_heads=heads,
                num_kv_heads=attention.num_kv_heads,
                head_dim=attention.head_dim,
                dtype=x.dtype,
                streams=attention.method.cached_streams,
            )
            self.running = RunningState(torch.zeros(b, heads, n, dtype=self.dtype), torch.zeros(b, dtype=self.dtype))
        self._column_sums: Tensor | None = None

    def blocks(self) -> Iterator[MapRows]:
        n = self.x.shape[1]
        for begin in range(0, n, self.rows):
            end = min(begin + self.rows, n)
            part = self.layout.part(begin, end)
            ctx = _MapContext(self, part, begin)
            effective = self.attention.method.attention_map(ctx)
            assert ctx.first_map is not None
            self.cache.advance(end - begin)
            documents = part.documents_of_rows
            first_key = documents.begin.gather(1, documents.of_row)
            allowed = part.dense[:, 0] & part.counted[..., None]
            yield MapRows(effective.to(self.dtype), ctx.first_map, _widened(allowed, n), begin, part.counted, first_key)

    def column_sums(self) -> Tensor:
        """What each key receives from all rows of its document under ``A1``, ``[B, H, N]``."""
        if self._column_sums is None:
            maps = _Maps(self.attention, self.x, self.layout, self.rows, literal=False)
            self._column_sums = torch.zeros_like(self.running.total)
            for block in maps.blocks():
                self._column_sums += block.first.sum(2)
        return self._column_sums


class _MapContext(AttentionContext):
    """Rows of a layer's forward with the identity for values: ``attend`` returns rows of its map, ``[B, H, R, N]``."""

    def __init__(self, maps: _Maps, part: Layout, begin: int) -> None:
        super().__init__(
            maps.x[:, begin : begin + part.num_queries],
            shape=maps.attention.shape,
            projections=maps.attention.projections,
            layout=part,
            cache=maps.cache,
            backend=Backend.EAGER,
        )
        self._maps = maps
        self.first_map: Tensor | None = None

    def project_v(self, x: Tensor) -> Tensor:
        """There are no values, nor any use of them."""
        return x

    def values(self, t: Tensor, stream: str) -> Tensor:
        return t

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
        b, h, rows, hd = q.shape
        grouped = q.to(self._maps.dtype).reshape(b, k.shape[1], -1, hd)
        logits = grouped @ k.to(self._maps.dtype).transpose(-1, -2)
        logits = logits.view(b, h, rows, -1) * (self._scale if scale is None else scale)
        if bias is not None:
            logits = logits + bias
        weights = logits.masked_fill(~self._layout.dense, float("-inf")).softmax(-1)
        weights = _widened(weights.masked_fill(~self._layout.counted[:, None, :, None], 0.0), self._maps.x.shape[1])
        if self.first_map is None:
            self.first_map = weights
        return weights

    def integral(self, o1: Tensor, o2: Tensor, lam: Tensor) -> Tensor:
        return integral(o1, o2, lam, self._layout, self._maps.running)

    def document_mean(self, o: Tensor) -> Tensor:
        if not self._maps.literal:
            return torch.zeros_like(o)
        whole, rows = self._maps.layout, self._layout
        same = rows.documents_of_rows.of_row[..., None] == whole.documents_of_rows.of_row[:, None]
        same = (same & rows.counted[..., None] & whole.counted[:, None]).to(o.dtype)  # [B or 1, R, N]
        share = same / same.sum(-1, keepdim=True).clamp(min=1)
        return self._maps.column_sums()[:, :, None] * share[:, None]

    def attend_static(self, maps: Tensor, v: Tensor, *, alignment: str, softmax: bool) -> Tensor:
        future = torch.ones(maps.shape[-2:], dtype=torch.bool, device=maps.device).triu(1)
        maps = maps.masked_fill(future, float("-inf")).softmax(-1) if softmax else maps.masked_fill(future, 0.0)
        dense = self.static_bias(maps.to(self._maps.dtype), alignment=alignment)
        hidden = ~(self._layout.dense & self._layout.counted[:, None, :, None])
        return _widened(dense.masked_fill(hidden, 0.0), self._maps.x.shape[1])


def _widened(t: Tensor, width: int) -> Tensor:
    """Zeros for the keys that come later."""
    return F.pad(t, (0, width - t.shape[-1]))
