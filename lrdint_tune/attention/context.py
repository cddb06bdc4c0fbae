"""What the attention module hands to a method: the primary projections and the means to attend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lrdint_tune.attention.cache import AttentionCache
from lrdint_tune.attention.core import Backend, attend, document_mean, integral
from lrdint_tune.attention.entropy import mean_row_entropy
from lrdint_tune.attention.layout import Layout
from lrdint_tune.attention.lazy import cached_property
from lrdint_tune.attention.shape import AttentionShape
from lrdint_tune.attention.static_map import attend_static, static_bias

Rope = Callable[..., Tensor]
Projection = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Projections:
    """The pretrained projections, biases and linear adapters included, and their rotary embedding."""

    q: Projection
    k: Projection
    v: Projection
    rope: Rope | None


class AttentionContext:
    """One layer's forward, seen from a method.

    Masks, GQA, documents, padding, RoPE, KV caches and kernels are dealt with behind these calls, so a method is only
    its formula. The primary projections are computed when they are first asked for.

    Attributes:
        x: ``[B, N, D]``, the layer's (normalised) input.
    """

    def __init__(
        self,
        x: Tensor,
        *,
        shape: AttentionShape,
        projections: Projections,
        layout: Layout,
        cache: AttentionCache | None,
        backend: Backend,
    ) -> None:
        self.x = x
        self._shape = shape
        self._projections = projections
        self._layout = layout
        self._cache = cache
        self._backend = backend
        self._scale = shape.head_dim**-0.5

    @cached_property
    def q_unrotated(self) -> Tensor:
        """Primary queries before RoPE, ``[B, N, H, hd]``."""
        return self.project_q(self.x)

    @cached_property
    def q(self) -> Tensor:
        """Primary queries after RoPE, ``[B, H, N, hd]``."""
        return self.queries(self.q_unrotated)

    @cached_property
    def k(self) -> Tensor:
        """Primary keys after RoPE, cached and gathered ones included, ``[B, K, M, hd]``."""
        return self.keys(self.project_k(self.x), "k")

    @cached_property
    def v(self) -> Tensor:
        """Primary values, cached and gathered ones included, ``[B, K, M, hd]``."""
        return self.values(self.project_v(self.x), "v")

    def project_q(self, x: Tensor) -> Tensor:
        """``x W_Q``, ``[B, N, D]`` -> ``[B, N, H, hd]``."""
        return self._projections.q(x).unflatten(-1, (self._shape.num_heads, -1))

    def project_k(self, x: Tensor) -> Tensor:
        """``x W_K``, ``[B, N, D]`` -> ``[B, N, K, hd]``."""
        return self._projections.k(x).unflatten(-1, (self._shape.num_kv_heads, -1))

    def project_v(self, x: Tensor) -> Tensor:
        """``x W_V``, ``[B, N, D]`` -> ``[B, N, K, hd]``."""
        return self._projections.v(x).unflatten(-1, (self._shape.num_kv_heads, -1))

    def queries(self, t: Tensor) -> Tensor:
        """``[B, N, H, hd]`` -> ``[B, H, N, hd]`` with RoPE."""
        return self._rotate(t).transpose(1, 2)

    def keys(self, t: Tensor, stream: str) -> Tensor:
        """``[B, N, K, hd]`` -> ``[B, K, M, hd]`` with RoPE, after the cached keys of ``stream``."""
        return self._with_earlier(self._rotate(t).transpose(1, 2), stream)

    def values(self, t: Tensor, stream: str) -> Tensor:
        """``[B, N, K, hd]`` -> ``[B, K, M, hd]``, after the cached values of ``stream``."""
        return self._with_earlier(t.transpose(1, 2), stream)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
        """``softmax(q k^T * scale + bias) v``, ``[B, H, N, hd]``; ``scale`` defaults to ``1/sqrt(hd)``, ``bias`` ``[B,
        H, N, M]`` to none."""
        scale = self._scale if scale is None else scale
        return attend(q, k, v, self._layout, scale=scale, backend=self._backend, bias=bias)

    def integral(self, o1: Tensor, o2: Tensor, lam: Tensor) -> Tensor:
        """``O1 + λ (mean(O1) - O2)``, the mean over the document's rows up to each row."""
        return integral(o1, o2, lam, self._layout, None if self._cache is None else self._cache.running)

    def document_mean(self, o: Tensor) -> Tensor:
        """``A3 v`` as printed in the seeds: the mean over all of the document's rows, future ones included."""
        return document_mean(o, self._layout)

    def attend_static(self, maps: Tensor, v: Tensor, *, alignment: str, softmax: bool) -> Tensor:
        """``tril(map) v`` on ``n`` positions of each document for maps ``[H_s, n, n]`` that no token changes, ``[B, H,
        N, hd]``; see :func:`~lrdint_tune.attention.static_map.attend_static`."""
        return attend_static(
            maps, v, self._layout, num_heads=self._shape.num_heads, alignment=alignment, softmax=softmax
        )

    def static_bias(self, maps: Tensor, *, alignment: str) -> Tensor:
        """The same maps as a dense ``[B, H, N, M]``, 0 outside the ``n`` positions."""
        return static_bias(maps, self._layout, num_heads=self._shape.num_heads, alignment=alignment)

    def mean_row_entropy(self, q: Tensor, k: Tensor) -> Tensor:
        """Entropy of the rows of ``softmax(q k^T / sqrt(hd))`` in nats, the mean per head, float32 ``[H]``."""
        return mean_row_entropy(q, k, self._layout, scale=self._scale)

    def _rotate(self, t: Tensor) -> Tensor:
        rope = self._projections.rope
        return t if rope is None else rope(t, input_pos=self._layout.input_pos)

    def _with_earlier(self, t: Tensor, stream: str) -> Tensor:
        if self._layout.shard is not None:  # those of later processes are nobody's business here
            return self._layout.shard.gather(t, 2)[:, :, : self._layout.num_keys]
        return t if self._cache is None else self._cache.append(stream, t)
