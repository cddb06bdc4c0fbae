"""Tiny models whose heads are wider than embed_dim / num_heads, and Hugging Face folders of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lrdint_tune.export import save_adapter
from lrdint_tune.models import LlamaDecoder, llama3_2
from lrdint_tune.models.spec import ModelSpec

SIZES: dict[str, Any] = dict(
    vocab_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    embed_dim=24,
    head_dim=8,
    max_seq_len=64,
    intermediate_dim=36,
    rope_base=10_000,
    norm_eps=1e-5,
    scale_factor=1,
    tie_word_embeddings=True,
)


def random_model(method: str = "none", **options: Any) -> LlamaDecoder:
    """A model with random numbers in every tensor of its state dict, so that no two of them can be confused."""
    model = llama3_2(**{**SIZES, "method": method, **options}).eval()
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn_like(tensor) * 0.3)
    return model


def stock_llama(**changes: Any) -> LlamaForCausalLM:
    """transformers' Llama of the same sizes, randomly initialised; ``scale_factor`` as in our builder."""
    sizes = {**SIZES, **changes}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(sizes["rope_base"])}
    if sizes["scale_factor"] != 1:
        rope |= {
            "rope_type": "llama3",
            "factor": float(sizes["scale_factor"]),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    config = LlamaConfig(
        vocab_size=sizes["vocab_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"],
        hidden_size=sizes["embed_dim"],
        head_dim=sizes["head_dim"],
        max_position_embeddings=sizes["max_seq_len"],
        intermediate_size=sizes["intermediate_dim"],
        rms_norm_eps=sizes["norm_eps"],
        tie_word_embeddings=sizes["tie_word_embeddings"],
        rope_parameters=rope,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def stock_folder(folder: Path, **changes: Any) -> LlamaForCausalLM:
    """Save a stock Llama with transformers; the model is returned."""
    model = stock_llama(**changes)
    model.save_pretrained(folder)
    return model


def assert_equal_states(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same names, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def save_tensors(folder: Path, tensors: dict[str, Tensor], spec: ModelSpec, **options: Any) -> None:
    """``save_adapter`` of tensors that are at hand."""
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    given: dict[str, Any] = {"base_model_name_or_path": "base", "trainable": ["adapter"], **options}
    save_adapter(folder, tensors.items(), spec, dtypes=dtypes, **given)
