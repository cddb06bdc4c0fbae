"""What a model is, in plain data: enough to build it, to name its weights and to write its config.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelSpec:
    """The sizes of a Llama and the method its attention carries.

    Attributes:
        scale_factor: of Llama 3.1's RoPE scaling; 1 means plain RoPE.
        method_options: every option of the method, defaults filled in.
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

    @property
    def leaks_future(self) -> bool:
        """True for a model whose outputs depend on later tokens (``integral: sequence``)."""
        return self.method_options.get("integral") == "sequence"
