"""What a method sees of a ``transformers`` model."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from lrdint_tune.attention import Backend
from lrdint_tune.attention.context import AttentionContext, Projections
from lrdint_tune.hosts.architectures import HostLayer
from lrdint_tune.hosts.layout import host_layout


class HostContext(AttentionContext):
    """One call of the attention function: ``q``, ``k``, ``v`` come projected, rotated, and with the cached tokens.

    Args:
        x: ``[B, N, D]``, the attention module's input.
        q: ``[B, H, N, hd]``.
        k, v: ``[B, K, M, hd]``.
        layer: where the call comes from.
        mask: bool ``[B, 1, N, M]``, True where attention is allowed, or None for all that ``causal`` allows.
        causal: False for encoders.
        scale: the module's multiplier of the logits.
        dropout: on the attention weights; 0 outside training.
    """

    def __init__(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: HostLayer,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
        dropout: float,
    ) -> None:
        layout = host_layout(
            None if mask is None else mask[:, 0],
            causal=causal,
            num_queries=q.shape[2],
            num_keys=k.shape[2],
            device=q.device,
        )
        super().__init__(
            x,
            shape=layer.shape,
            projections=_projections(layer),
            layout=layout,
            cache=None,  # the host's own holds k and v
            backend=Backend.SDPA,
        )
        self.q, self.k, self.v = q, k, v
        self._mask, self._causal, self._dropout = mask, causal, dropout
        if scale is not None:
            self._scale = scale

    @cached_property
    def q_unrotated(self) -> Tensor:
        """``[B, N, H, hd]``; only for hosts without RoPE, see :func:`~lrdint_tune.hosts.attach.attach`."""
        return self.q.transpose(1, 2)

    @cached_property
    def _allowed(self) -> tuple[Tensor, Tensor]:
        """The mask with key 0 opened for the rows that may see none, to keep their softmax finite, and those rows."""
        mask = self._layout.dense if self._mask is None else self._mask
        empty = ~mask.any(-1, keepdim=True)
        return mask | (empty & (torch.arange(mask.shape[-1], device=mask.device) == 0)), empty

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
        """``softmax(q k^T * scale + bias) v`` with the host's mask and dropout, ``[B, H, N, hd]``."""
        mask, empty = (None, None) if self._mask is None and bias is None else self._allowed
        if bias is not None:
            assert mask is not None
            mask = bias.to(q.dtype).masked_fill(~mask, float("-inf"))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self._dropout,
            is_causal=mask is None and self._causal,
            scale=self._scale if scale is None else scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out if empty is None else out.masked_fill(empty, 0.0)


class ValueContext(AttentionContext):
    """The forward of the value projection, before its output is cached: ``attend`` is left to the host and returns the
    values, so that what a method computes is ``v'``.

    Args:
        x: ``[B, N, D]``, the projection's input.
        v: ``[B, N, K, hd]``, its output.
        layer: where it is.
    """

    def __init__(self, x: Tensor, v: Tensor, *, layer: HostLayer) -> None:
        layout = host_layout(None, causal=True, num_queries=x.shape[1], num_keys=x.shape[1], device=x.device)
        super().__init__(
            x, shape=layer.shape, projections=_projections(layer), layout=layout, cache=None, backend=Backend.SDPA
        )
        self._projected = v
        self.q = self.k = v.new_empty(0)

    def project_v(self, x: Tensor) -> Tensor:
        return self._projected if x is self.x else super().project_v(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
        """``v``."""
        return v


def _projections(layer: HostLayer) -> Projections:
    def no_keys(x: Tensor) -> Tensor:
        raise RuntimeError("a host has no place for keys of a method's own")

    return Projections(layer.query, no_keys, layer.value, rope=None)
