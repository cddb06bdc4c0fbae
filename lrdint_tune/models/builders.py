"""Model builders: the published sizes. Each takes ``method`` and its options; see
:func:`~lrdint_tune.models.component.llama3_2`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lrdint_tune.models.component import llama3_2
from lrdint_tune.models.decoder import LlamaDecoder


def _builder(name: str, title: str, **sizes: Any) -> Callable[..., LlamaDecoder]:
    def build(method: str = "none", **options: Any) -> LlamaDecoder:
        return llama3_2(**{**sizes, "method": method, **options})

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{title}.

    Args:
        method: the differential method; see :func:`~lrdint_tune.models.component.llama3_2`.
        options: the method's options (``rank`` ...), ``attention_backend``, ``adapters``, or another value for one of
            the sizes, e.g. ``max_seq_len`` for a shorter RoPE cache.

    Raises:
        ConfigError: unknown method, adapter or option, or a bad option value.
    """
    return build


_LLAMA2 = dict(vocab_size=32_000, max_seq_len=4096, rope_base=10_000, scale_factor=1, tie_word_embeddings=False)
_LLAMA3 = dict(vocab_size=128_256, max_seq_len=8192, rope_base=500_000, scale_factor=1, tie_word_embeddings=False)
_LLAMA3_1 = {**_LLAMA3, "max_seq_len": 131_072, "scale_factor": 8}
_LLAMA3_2 = {**_LLAMA3, "max_seq_len": 131_072, "scale_factor": 32, "tie_word_embeddings": True}
_7B = dict(num_layers=32, num_heads=32, num_kv_heads=32, embed_dim=4096, intermediate_dim=11_008)
_13B = dict(num_layers=40, num_heads=40, num_kv_heads=40, embed_dim=5120, intermediate_dim=13_824)
_8B = dict(num_layers=32, num_heads=32, num_kv_heads=8, embed_dim=4096, intermediate_dim=14_336)
_70B = dict(num_layers=80, num_heads=64, num_kv_heads=8, embed_dim=8192, intermediate_dim=28_672)

llama_7b = _builder("llama_7b", "LLaMA (v1) 7B", **{**_LLAMA2, "max_seq_len": 2048}, **_7B, norm_eps=1e-6)
llama_13b = _builder("llama_13b", "LLaMA (v1) 13B", **{**_LLAMA2, "max_seq_len": 2048}, **_13B, norm_eps=1e-6)
llama2_7b = _builder("llama2_7b", "Llama 2 7B", **_LLAMA2, **_7B)
llama2_13b = _builder("llama2_13b", "Llama 2 13B", **_LLAMA2, **_13B)
llama2_70b = _builder("llama2_70b", "Llama 2 70B", **_LLAMA2, **_70B)
llama3_8b = _builder("llama3_8b", "Llama 3 8B", **_LLAMA3, **_8B)
llama3_70b = _builder("llama3_70b", "Llama 3 70B", **_LLAMA3, **_70B)
llama3_1_8b = _builder("llama3_1_8b", "Llama 3.1 8B", **_LLAMA3_1, **_8B)
llama3_1_70b = _builder("llama3_1_70b", "Llama 3.1 70B", **_LLAMA3_1, **_70B)
llama3_2_1b = _builder(
    "llama3_2_1b",
    "Llama 3.2 1B",
    **_LLAMA3_2,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    embed_dim=2048,
    intermediate_dim=8192,
)
llama3_2_3b = _builder(
    "llama3_2_3b",
    "Llama 3.2 3B",
    **_LLAMA3_2,
    num_layers=28,
    num_heads=24,
    num_kv_heads=8,
    embed_dim=3072,
    intermediate_dim=8192,
)
llama3_3_70b = _builder("llama3_3_70b", "Llama 3.3 70B", **_LLAMA3_1, **_70B)
smollm2_135m = _builder(
    "smollm2_135m",
    "SmolLM2 135M",
    vocab_size=49_152,
    max_seq_len=8192,
    rope_base=100_000,
    scale_factor=1,
    tie_word_embeddings=True,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    embed_dim=576,
    intermediate_dim=1536,
)
