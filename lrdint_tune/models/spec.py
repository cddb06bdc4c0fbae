"""What a model is, in plain data: enough to build it, to name its weights and to write its config.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lrdint_tune.attention import METHODS, AttentionShape


@dataclass(frozen=True)
class ModelSpec:
    """The sizes of a Llama, the method its attention carries and the adapters beside it.

    Attributes:
        scale_factor: of Llama 3.1's RoPE scaling; 1 means plain RoPE.
        method_options: every option of the method, defaults filled in.
        adapters: the builder's option of that name, every default filled in.
    """

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    embed_dim: int
    head_dim: int
    intermediate_dim: int
    max_seq_len: int
    rope_base: int
    norm_eps: float
    scale_factor: int
    tie_word_embeddings: bool
    method: str = "none"
    method_options: dict[str, Any] = field(default_factory=dict)
    adapters: list[dict[str, Any]] = field(default_factory=list)

    @property
    def shape(self) -> AttentionShape:
        """Of the first attention layer."""
        return AttentionShape(self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim)

    @property
    def is_stock(self) -> bool:
        """True for a plain Llama, without any new tensor."""
        return self.method == "none" and not self.adapters

    @property
    def leaks_future(self) -> bool:
        """True for a model in which later tokens reach earlier outputs (``integral: sequence``)."""
        return METHODS[self.method].leaks_future(self.method_options)
