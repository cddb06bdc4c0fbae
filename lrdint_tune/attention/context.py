"""What the attention module hands to a method: the primary projections and the means to attend."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lrdint_tune.attention.cache import AttentionCache
from lrdint_tune.attention.core import Backend, attend, document_mean, integral
from lrdint_tune.attention.layout import Layout

Rope = Callable[..., Tensor]


class AttentionContext:
    """One layer's forward, seen from a method.

    Masks, GQA, documents, padding, RoPE, KV caches and kernels are dealt with behind these calls, so a method is only
    its formula.

    Attributes:
        x: ``[B, N, D]``, the layer's (normalised) input.
        q: ``[B, H, N, hd]``, primary queries after RoPE.
        k: ``[B, K, M, hd]``, primary keys after RoPE, cached ones included.
        v: ``[B, K, M, hd]``, values, cached ones included.
    """

    def __init__(
        self,
        x: Tensor,
        *,
        layout: Layout,
        rope: Rope | None,
        cache: AttentionCache | None,
        backend: Backend,
        head_dim: int,
    ) -> None:
        self.x = x
        self._layout = layout
        self._rope = rope
        self._cache = cache
        self._backend = backend
        self._scale = head_dim**-0.5
        self.q: Tensor
        self.k: Tensor
        self.v: Tensor

    def queries(self, t: Tensor) -> Tensor:
        """``[B, N, H, hd]`` -> ``[B, H, N, hd]`` with RoPE."""
        return self._rotate(t).transpose(1, 2)

    def keys(self, t: Tensor, stream: str) -> Tensor:
        """``[B, N, K, hd]`` -> ``[B, K, M, hd]`` with RoPE, after the cached keys of ``stream``."""
        return self._cached(self._rotate(t).transpose(1, 2), stream)

    def values(self, t: Tensor, stream: str) -> Tensor:
        """``[B, N, K, hd]`` -> ``[B, K, M, hd]``, after the cached values of ``stream``."""
        return self._cached(t.transpose(1, 2), stream)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """``softmax(q k^T * scale) v``, ``[B, H, N, hd]``; ``scale`` defaults to ``1/sqrt(hd)``."""
        return attend(q, k, v, self._layout, scale=self._scale if scale is None else scale, backend=self._backend)

    def integral(self, o1: Tensor, o2: Tensor, lam: Tensor) -> Tensor:
        """``O1 + λ (mean(O1) - O2)``, the mean over the document's rows up to each row."""
        return integral(o1, o2, lam, self._layout, None if self._cache is None else self._cache.running)

    def document_mean(self, o: Tensor) -> Tensor:
        """``A3 v`` as printed in the seeds: the mean over all of the document's rows, future ones included."""
        return document_mean(o, self._layout)

    def _rotate(self, t: Tensor) -> Tensor:
        return t if self._rope is None else self._rope(t, input_pos=self._layout.input_pos)

    def _cached(self, t: Tensor, stream: str) -> Tensor:
        return t if self._cache is None else self._cache.append(stream, t)
