"""The two operations every method is made of: masked softmax attention, and the mean over the rows of a document.

Shapes throughout: ``B`` batch, ``N`` query rows, ``M`` keys, ``H`` query heads, ``K`` key/value heads (GQA, ``H % K ==
0``), ``hd`` head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from lrdint_tune.attention.layout import Layout
from lrdint_tune.attention.prefix_mean import integral as fused_integral
from lrdint_tune.errors import ConfigError


class Backend(str, Enum):
    """Which kernel computes ``softmax(q k^T s) v``.

    ``eager`` materialises the ``N x N`` map (the reference, and what FLOP counters can see); ``sdpa`` is torch's fused
    kernel; ``flex`` is FlexAttention (CUDA; forward only on CPU); ``auto`` takes ``flex`` for block masks and, on CUDA,
    for packed documents and for sequences that several processes share; ``sdpa`` otherwise.
    """

    EAGER = "eager"
    SDPA = "sdpa"
    FLEX = "flex"
    AUTO = "auto"

    @classmethod
    def parse(cls, name: str) -> Backend:
        """Raises ConfigError for an unknown name."""
        try:
            return cls(name)
        except ValueError:
            raise ConfigError(
                f"attention_backend={name!r}: unknown; choose one of {', '.join(b.value for b in cls)}"
            ) from None


def takes_flex(backend: Backend, layout: Layout, *, biased: bool) -> bool:
    """Whether FlexAttention serves ``layout``, in a call with or without a bias on the logits."""
    if backend is not Backend.AUTO:
        return backend is Backend.FLEX
    masked = layout.documents is not None or layout.shard is not None
    return layout.is_block_mask or (masked and layout.device.type == "cuda" and not biased)


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, scale: float, backend: Backend, bias: Tensor | None = None
) -> Tensor:
    """``softmax(q k^T * scale + bias) v`` under the mask of ``layout``.

    Args:
        q: ``[B, H, N, hd]``.
        k, v: ``[B, K, M, hd]``; shared by the ``H / K`` query heads of a group without being repeated.
        layout: the mask.
        scale: multiplier of the logits.
        backend: the kernel.
        bias: ``[B or 1, H, N, M]``, added to the logits; ``eager`` and ``sdpa`` only, and it is as large as the map.

    Raises:
        ConfigError: ``flex`` with a bias, or with a gradient on a device where it has none.

    Returns:
        ``[B, H, N, hd]`` in ``q.dtype``. A row with no allowed key is 0 and passes no gradient.
    """
    if backend is Backend.AUTO:
        backend = Backend.FLEX if takes_flex(backend, layout, biased=bias is not None) else Backend.SDPA
    out = _KERNELS[backend](q, k, v, layout, scale, bias)
    if layout.valid is not None:
        out = out.masked_fill(~layout.valid[:, None, :, None], 0.0)
    return out


def _eager(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, bias: Tensor | None) -> Tensor:
    b, h, n, hd = q.shape
    groups = k.shape[1]
    q = q.reshape(b, groups, (h // groups) * n, hd)  # the rows of a group's heads, one after another: no repeated K/V
    logits = (q @ k.transpose(-1, -2) * scale).view(b, h, n, -1)
    if bias is not None:
        logits = logits + bias
    weights = logits.masked_fill(~layout.dense, float("-inf")).softmax(
        -1, dtype=torch.promote_types(q.dtype, torch.float32)
    )
    return (weights.to(q.dtype).view(b, groups, (h // groups) * n, -1) @ v).view(b, h, n, -1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, bias: Tensor | None) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    if bias is not None:
        mask = bias.to(q.dtype).masked_fill(~layout.dense, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
    if layout.is_plain_causal:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    if layout.documents is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=layout.dense, scale=scale, enable_gqa=gqa)
    # One causal call per document: less work than a masked N x N call, and no N x N mask.
    rows = []
    for row, spans in enumerate(layout.spans_of_rows()):
        parts = [
            _causal(
                q[row : row + 1, :, first:last], k[row : row + 1, :, begin:end], v[row : row + 1, :, begin:end], scale
            )
            for first, last, begin, end in spans
        ]
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention whose queries are the last ones: all of them, or with keys of earlier processes before."""
    gqa, n, m = q.shape[1] != k.shape[1], q.shape[2], k.shape[2]
    if n == m:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)


def _flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, bias: Tensor | None) -> Tensor:
    if bias is not None:
        raise ConfigError("attention_backend='flex': takes no bias on the logits; use sdpa or eager")
    if not q.is_cuda and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ConfigError(
            f"attention_backend='flex' on device '{q.device.type}': FlexAttention has no backward there; use sdpa or "
            "eager"
        )
    # Within a compiled block it is compiled with it.
    kernel = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    return kernel(q, k, v, block_mask=layout.block_mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


@cache
def _compiled_flex():
    # Uncompiled, flex_attention materialises the N x N map.
    return torch.compile(flex_attention, dynamic=False)


_KERNELS = {Backend.EAGER: _eager, Backend.SDPA: _sdpa, Backend.FLEX: _flex}


@dataclass
class RunningState:
    """What the prefix mean needs to remember between decoding steps.

    Attributes:
        total: float32 ``[B, H, hd]``, the sum of the current document's rows so far.
        count: float32 ``[B]``, how many rows that sum holds.
    """

    total: Tensor
    count: Tensor


def running_mean(o: Tensor, layout: Layout, state: RunningState | None = None) -> Tensor:
    """Prefix mean over the rows of a document: ``out[i] = 1/c_i sum_{m <= i, same document} o[m]`` (docs/methods.md).

    With ``o = A1 v`` this is ``A3 v`` for the causal ``A3[i, j] = 1/(i+1) sum_{m <= i} A1[m, j]``: no ``N x N`` map.
    Rows that may see no key (padding) are not counted, and receive 0.

    Args:
        o: ``[B, H, N, hd]``.
        layout: documents and padding.
        state: while decoding, the sums of the rows before this call; updated in place.

    Returns:
        ``[B, H, N, hd]`` in ``o.dtype``, accumulated in float32 (float64 for float64 input): a bf16 sum over thousands
        of positions loses the result.
    """
    x = o.to(torch.promote_types(o.dtype, torch.float32))
    if state is None:
        return layout.prefix_mean(x.dtype)(x).to(o.dtype)
    return _continued_mean(x, layout, state).to(o.dtype)


def _continued_mean(x: Tensor, layout: Layout, state: RunningState) -> Tensor:
    b, _, n, hd = x.shape
    starts = layout.document_starts.expand(b, n)
    weight = layout.counted.expand(b, n).to(x.dtype)

    weighted = x * weight[:, None, :, None]
    total, count = weighted.cumsum(2), weight.cumsum(1)
    # What had accumulated before the current document began is subtracted again.
    rows = torch.arange(n, device=x.device).expand(b, n)
    begin = torch.where(starts, rows, 0).cummax(1).values  # [B, N]
    index = begin[:, None, :, None].expand_as(x)
    total = total - (total - weighted).gather(2, index)
    count = count - (count - weight).gather(1, begin)
    continuing = (starts.cumsum(1) == 0).to(x.dtype)  # rows of the document that began before this call
    total = total + continuing[:, None, :, None] * state.total[:b, :, None].to(x.dtype)
    count = count + continuing * state.count[:b, None].to(x.dtype)
    state.total[:b] = total[:, :, -1].detach().to(state.total.dtype)
    state.count[:b] = count[:, -1].to(state.count.dtype)
    return total * (weight / count.clamp(min=1.0))[:, None, :, None]


def integral(o1: Tensor, o2: Tensor, lam: Tensor, layout: Layout, state: RunningState | None = None) -> Tensor:
    """``O1 + λ (mean(O1) - O2)`` with :func:`running_mean` for the mean (docs/methods.md).

    Args:
        o1, o2: ``[B, H, N, hd]``.
        lam: broadcastable to that.
        layout, state: as for :func:`running_mean`.

    Returns:
        ``[B, H, N, hd]`` in ``o1.dtype``.
    """
    if state is None:
        return fused_integral(o1, o2, lam, layout.prefix_mean(torch.promote_types(o1.dtype, torch.float32)))
    return o1 + lam * (running_mean(o1, layout, state) - o2)


def document_mean(o: Tensor, layout: Layout) -> Tensor:
    """The literal ``A3 v`` of the seeds: every row receives the mean over ALL rows of its document, future ones too.

    This leaks the future into the past (docs/methods.md) and exists only to measure that. Shapes and dtypes as
    :func:`running_mean`; there is no cached form.
    """
    x = o.to(torch.promote_types(o.dtype, torch.float32))
    b, _, n, _ = x.shape
    ids = layout.document_starts.cumsum(1).expand(b, n)
    weight = layout.counted.expand(b, n).to(x.dtype)
    totals = x.new_zeros(b, n + 1, *x.shape[1::2])  # [B, documents, H, hd]
    counts = x.new_zeros(b, n + 1)
    rows = torch.arange(b, device=x.device)[:, None].expand(b, n)
    totals = totals.index_put((rows, ids), (x * weight[:, None, :, None]).transpose(1, 2), accumulate=True)
    counts = counts.index_put((rows, ids), weight, accumulate=True)
    means = totals / counts.clamp(min=1.0)[:, :, None, None]
    return (means[rows, ids] * weight[:, :, None, None]).transpose(1, 2).to(o.dtype)
