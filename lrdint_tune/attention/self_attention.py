"""Self-attention with a slot for one method, in the shape torchtune's transformer layer expects."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrdint_tune.attention.cache import AttentionCache
from lrdint_tune.attention.context import AttentionContext, Projections
from lrdint_tune.attention.core import Backend, takes_flex
from lrdint_tune.attention.layout import Layout, MaskType
from lrdint_tune.attention.methods import AttentionMethod
from lrdint_tune.attention.shape import AttentionShape
from lrdint_tune.errors import ConfigError


class DifferentialSelfAttention(nn.Module):
    """Grouped-query self-attention whose output is computed by ``method``.

    Parameter names are those of torchtune's ``MultiHeadAttention``; the method's tensors stand under ``method.``.

    Args:
        embed_dim: ``D``.
        num_heads: ``H``.
        num_kv_heads: ``K``; ``H % K == 0``.
        head_dim: ``hd``; need not be ``D / H``.
        q_proj, k_proj, v_proj, output_proj: ``D -> H hd``, ``D -> K hd``, ``D -> K hd``, ``H hd -> D``.
        method: what is done with them.
        pos_embeddings: RoPE on ``[B, N, heads, hd]``, or None.
        max_seq_len: longest sequence.
        attention_backend: ``eager | sdpa | flex | auto``.

    Raises:
        ConfigError: ``num_heads`` not divisible by ``num_kv_heads``, or an unknown backend.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        output_proj: nn.Module,
        method: AttentionMethod,
        pos_embeddings: nn.Module | None = None,
        max_seq_len: int = 4096,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ConfigError(f"num_heads={num_heads}: must be divisible by num_kv_heads={num_kv_heads}")
        if head_dim % 2:
            raise ConfigError(f"head_dim={head_dim}: must be even, RoPE turns pairs of features")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.max_seq_len = max_seq_len
        self.backend = Backend.parse(attention_backend)
        self.q_proj = q_proj
        self.k_proj = k_proj
        self.v_proj = v_proj
        self.output_proj = output_proj
        self.pos_embeddings = pos_embeddings
        self.method = method
        self.kv_cache: AttentionCache | None = None
        self.cache_enabled = False

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim)

    @property
    def projections(self) -> Projections:
        return Projections(self.q_proj, self.k_proj, self.v_proj, self.pos_embeddings)

    def setup_cache(self, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
        """Allocate the cache: keys, values and the method's own streams ``[batch_size, K, max_seq_len, hd]`` in
        ``dtype``.

        Raises:
            ConfigError: if the method's decoding would be another function than its training (it lets future tokens
                reach the past, or depends on the final length).
            RuntimeError: if a cache exists already.
        """
        if self.method.cache_refusal is not None:
            raise ConfigError(self.method.cache_refusal)
        if self.kv_cache is not None:
            raise RuntimeError("the KV cache exists already; call reset_cache() to empty it")
        self.kv_cache = AttentionCache(
            batch_size=batch_size,
            max_seq_len=max_seq_len,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=dtype,
            streams=self.method.cached_streams,
        ).to(self.q_proj.weight.device)  # type: ignore[arg-type]  # nn.Module attributes are untyped
        self.cache_enabled = True

    def reset_cache(self) -> None:
        """Empty the cache. Raises RuntimeError if there is none."""
        if self.kv_cache is None:
            raise RuntimeError("there is no KV cache; call setup_cache() first")
        self.kv_cache.reset()

    def prepare(self, layout: Layout, dtype: torch.dtype) -> None:
        """Make ``layout`` hold, as tensors, what forwards with input of ``dtype`` will read: compiled ones ask no more
        of it."""
        self.method.prepare(layout)
        biased = self.method.biases_logits
        flex = takes_flex(self.backend, layout, biased=biased)
        layout.prepare(dtype, flex=flex, dense=biased or self.backend is Backend.EAGER)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        mask: MaskType | Layout = None,
        input_pos: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            x: ``[B, N, D]``.
            y: None or ``x`` itself: this is self-attention.
            mask: None (causal), bool ``[B, N, M]`` with True where attention is allowed, ``BlockMask``,
                ``DocumentMask``, or a :class:`~lrdint_tune.attention.layout.Layout` already built by the model.
            input_pos: int ``[B, N]`` positions for RoPE; None counts from 0, or on from the cache.

        Returns:
            ``[B, N, D]``.

        Raises:
            ValueError: ``y`` is another tensor than ``x``, or the mask does not fit.
        """
        if y is not None and y is not x:
            raise ValueError("y must be x or None: this module is self-attention only")
        b, n, _ = x.shape
        cache = self.kv_cache if self.cache_enabled else None
        if isinstance(mask, Layout):
            layout = mask
        else:
            offset = 0 if cache is None else cache.size
            if input_pos is None and offset:
                input_pos = torch.arange(offset, offset + n, device=x.device)[None]
            layout = Layout(mask, input_pos, num_queries=n, batch_size=b, offset=offset, device=x.device)

        ctx = AttentionContext(
            x,
            shape=self.shape,
            projections=self.projections,
            layout=layout,
            cache=cache,
            backend=self.backend,
        )
        out = self.method(ctx).to(x.dtype)  # [B, H, N, hd]
        if cache is not None:
            cache.advance(n)
        return self.output_proj(out.transpose(1, 2).reshape(b, n, -1))
