"""The sizes of one attention layer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionShape:
    """``D``, ``H``, ``K``, ``hd``, and which layer of the model it is (from 0)."""

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_index: int = 0
