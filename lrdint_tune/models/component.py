"""The component builder: a Llama of any size whose attention carries one method."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from torchtune.modules import (
    FeedForward,
    RMSNorm,
    TiedLinear,
    TransformerSelfAttentionLayer,
)

from lrdint_tune.adapters import check_adapters
from lrdint_tune.attention import AttentionShape, DifferentialSelfAttention, build_method, method_options
from lrdint_tune.errors import ConfigError
from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.models.rope import PlainRoPE, ScaledRoPE
from lrdint_tune.models.spec import ModelSpec
from lrdint_tune.options import positive_int


def llama3_2(
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    max_seq_len: int,
    intermediate_dim: int,
    rope_base: int = 500_000,
    norm_eps: float = 1e-5,
    scale_factor: int = 32,
    tie_word_embeddings: bool = True,
    head_dim: int | None = None,
    method: str = "none",
    attention_backend: str = "auto",
    adapters: list[dict[str, Any]] | None = None,
    **method_options_given: Any,
) -> LlamaDecoder:
    """Build a Llama (2, 3, 3.1, 3.2, 3.3 and look-alikes) with differential attention.

    Args:
        vocab_size: tokens in the vocabulary.
        num_layers: transformer layers.
        num_heads: query heads ``H``.
        num_kv_heads: key/value heads ``K``; ``H % K == 0``.
        embed_dim: ``D``.
        max_seq_len: longest sequence; sizes the RoPE cache.
        intermediate_dim: width of the MLP.
        rope_base: base of the rotary embeddings.
        norm_eps: of the RMS norms.
        scale_factor: of Llama 3.1's RoPE scaling; 1 for plain RoPE (Llama 2 and 3, SmolLM2).
        tie_word_embeddings: whether the output head is the embedding matrix.
        head_dim: ``hd``; None takes ``D // H``.
        method: ``none | diff | dint | daa | dex | diffq | diffk | diffv | difflora | lmam``; ``none`` has torchtune's
            parameter names and nothing else.
        attention_backend: ``eager | sdpa | flex | auto``.
        adapters: adapters of the linear layers or of the MLP, one entry per type with its options, e.g. ``[{type: lora,
            target_modules: [o_proj, up_proj, down_proj], rank: 1, lora_alpha: 2}, {type: bottleneck, rank: 18}]``; see
            ``lrdint_tune.adapters``. Any method takes them.
        method_options_given: options of the method, e.g. ``rank``; see its class in ``lrdint_tune.attention.methods``.

    Returns:
        The model, randomly initialised (or without memory, under ``torch.device("meta")``). All layers share one RoPE
        module; after meta construction its cache must be built with ``rope_init()``.

    Raises:
        ConfigError: unknown method, option, adapter or backend, a bad option value, or sizes that do not divide.
    """
    adapters = check_adapters(adapters)
    sizes = {"vocab_size": vocab_size, "num_layers": num_layers, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
    sizes |= {"embed_dim": embed_dim, "max_seq_len": max_seq_len, "intermediate_dim": intermediate_dim}
    for name, size in sizes.items():
        positive_int(name, size)
    if head_dim is None:
        if embed_dim % num_heads:
            raise ConfigError(f"embed_dim={embed_dim}: not divisible by num_heads={num_heads}; set head_dim")
        head_dim = embed_dim // num_heads
    rope = build_rope(head_dim, max_seq_len, rope_base, scale_factor)
    layers = nn.ModuleList()
    for i in range(num_layers):
        shape = AttentionShape(embed_dim, num_heads, num_kv_heads, head_dim, layer_index=i)
        attention = DifferentialSelfAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            q_proj=nn.Linear(embed_dim, num_heads * head_dim, bias=False),
            k_proj=nn.Linear(embed_dim, num_kv_heads * head_dim, bias=False),
            v_proj=nn.Linear(embed_dim, num_kv_heads * head_dim, bias=False),
            output_proj=nn.Linear(num_heads * head_dim, embed_dim, bias=False),
            pos_embeddings=rope,
            max_seq_len=max_seq_len,
            method=build_method(method, shape, **method_options_given),
            attention_backend=attention_backend,
        )
        mlp = FeedForward(
            gate_proj=nn.Linear(embed_dim, intermediate_dim, bias=False),
            down_proj=nn.Linear(intermediate_dim, embed_dim, bias=False),
            up_proj=nn.Linear(embed_dim, intermediate_dim, bias=False),
        )
        layers.append(
            TransformerSelfAttentionLayer(
                attn=attention,
                mlp=mlp,
                sa_norm=RMSNorm(embed_dim, eps=norm_eps),
                mlp_norm=RMSNorm(embed_dim, eps=norm_eps),
            )
        )

    tok_embeddings = nn.Embedding(vocab_size, embed_dim)
    spec = ModelSpec(
        vocab_size=vocab_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        embed_dim=embed_dim,
        head_dim=head_dim,
        intermediate_dim=intermediate_dim,
        max_seq_len=max_seq_len,
        rope_base=rope_base,
        norm_eps=norm_eps,
        scale_factor=scale_factor,
        tie_word_embeddings=tie_word_embeddings,
        method=method,
        method_options={**method_options(method), **method_options_given},
    )
    model = LlamaDecoder(
        spec,
        tok_embeddings=tok_embeddings,
        layers=layers,
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
        norm=RMSNorm(embed_dim, eps=norm_eps),
        output=TiedLinear(tok_embeddings) if tie_word_embeddings else nn.Linear(embed_dim, vocab_size, bias=False),
    )
    model.attach_adapters(adapters)
    return model


def build_rope(head_dim: int, max_seq_len: int, rope_base: int, scale_factor: int) -> nn.Module:
    """Rotary embeddings in Meta (interleaved) order; Llama 3.1's frequency scaling unless ``scale_factor`` is 1."""
    if scale_factor == 1:
        return PlainRoPE(head_dim, max_seq_len=max_seq_len, base=rope_base)
    return ScaledRoPE(head_dim, max_seq_len=max_seq_len, base=rope_base, scale_factor=scale_factor)


def build_from_spec(spec: ModelSpec, **changes: Any) -> LlamaDecoder:
    """The model that has this spec, or one with other sizes: ``changes`` are fields of the spec."""
    sizes = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.name != "method_options"}
    return llama3_2(**{**sizes, **changes}, **spec.method_options)
