"""The KV cache of one attention layer, with room for whatever else its method must remember."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lrdint_tune.attention.core import RunningState


class AttentionCache(nn.Module):
    """Keys, values and a method's further streams, all ``[B, K, M_max, hd]``, and one running sum.

    Args:
        batch_size: the largest ``B``.
        max_seq_len: ``M_max``, the largest number of tokens.
        num_heads: ``H`` (for the running sum).
        num_kv_heads: ``K``.
        head_dim: ``hd``.
        dtype: of keys and values; the running sum is float32, or float64 if ``dtype`` is.
        streams: names of the method's own cached tensors, beside ``k`` and ``v``.
    """

    running_total: Tensor
    running_count: Tensor

    def __init__(
        self,
        *,
        batch_size: int,
        max_seq_len: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        streams: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.max_seq_len = max_seq_len
        self.size = 0
        shape = (batch_size, num_kv_heads, max_seq_len, head_dim)
        for name in ("k", "v", *streams):
            self.register_buffer(f"{name}_cache", torch.zeros(shape, dtype=dtype), persistent=False)
        sums = torch.promote_types(dtype, torch.float32)
        self.register_buffer(
            "running_total", torch.zeros(batch_size, num_heads, head_dim, dtype=sums), persistent=False
        )
        self.register_buffer("running_count", torch.zeros(batch_size, dtype=sums), persistent=False)

    @property
    def running(self) -> RunningState:
        """Views of the buffers: an in-place update of the state is an update of the cache."""
        return RunningState(self.running_total, self.running_count)

    def append(self, stream: str, t: Tensor) -> Tensor:
        """Store ``t`` ``[B, K, N, hd]`` behind the ``size`` tokens held; returns all held, ``[B, K, size + N, hd]``.

        The position moves only with :meth:`advance`, once per forward, so that all streams write to the same place.

        Raises:
            ValueError: if the batch or the number of tokens exceeds what the cache was set up for.
        """
        b, _, n, _ = t.shape
        end = self.size + n
        if b > self.batch_size or end > self.max_seq_len:
            raise ValueError(
                f"KV cache holds {self.batch_size} rows of {self.max_seq_len} tokens; got {b} rows and {end} tokens: "
                "call setup_caches with a larger batch_size or decoder_max_seq_len"
            )
        buffer = self.get_buffer(f"{stream}_cache")
        buffer[:b, :, self.size : end] = t
        return buffer[:b, :, :end]

    def advance(self, num_tokens: int) -> None:
        self.size += num_tokens

    def reset(self) -> None:
        """Forget everything; memory is kept."""
        self.size = 0
        for buffer in self.buffers():
            buffer.zero_()
