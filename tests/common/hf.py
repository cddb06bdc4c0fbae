"""Tiny transformers models and their weights under torchtune names, converted without the package's mapping."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PARTS = {
    "self_attn.q_proj.weight": "attn.q_proj.weight",
    "self_attn.k_proj.weight": "attn.k_proj.weight",
    "self_attn.v_proj.weight": "attn.v_proj.weight",
    "self_attn.o_proj.weight": "attn.output_proj.weight",
    "mlp.gate_proj.weight": "mlp.w1.weight",
    "mlp.down_proj.weight": "mlp.w2.weight",
    "mlp.up_proj.weight": "mlp.w3.weight",
    "input_layernorm.weight": "sa_norm.scale",
    "post_attention_layernorm.weight": "mlp_norm.scale",
}


def tiny_llama(sizes: dict[str, Any], attention: str = "eager") -> LlamaForCausalLM:
    """Random weights, norms included, for the same arguments as the component builder takes."""
    rope = {"rope_theta": float(sizes["rope_base"])}
    rope |= {"rope_type": "default"} if sizes["scale_factor"] == 1 else LLAMA3_ROPE
    config = LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["embed_dim"],
        intermediate_size=sizes["intermediate_dim"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"],
        head_dim=sizes["head_dim"],
        max_position_embeddings=sizes["max_seq_len"],
        rms_norm_eps=sizes["norm_eps"],
        tie_word_embeddings=sizes["tie_word_embeddings"],
        rope_parameters=rope,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def interleave(rows: Tensor, head_dim: int) -> Tensor:
    """Half-split rotary rows (feature i pairs with i + hd/2) to interleaved ones (2i with 2i + 1), along dim 0."""
    heads = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def to_torchtune(model: LlamaForCausalLM, gradients: bool = False) -> dict[str, Tensor]:
    """The state dict (or the gradients) under torchtune's names, query and key rows in interleaved order."""
    source = {name: p.grad if gradients else p.detach() for name, p in model.named_parameters()}
    head_dim = model.config.head_dim
    state = {"tok_embeddings.weight": source["model.embed_tokens.weight"], "norm.scale": source["model.norm.weight"]}
    if not model.config.tie_word_embeddings:
        state["output.weight"] = source["lm_head.weight"]
    for layer in range(model.config.num_hidden_layers):
        for theirs, ours in PARTS.items():
            tensor = source[f"model.layers.{layer}.{theirs}"]
            if "q_proj" in theirs or "k_proj" in theirs:
                tensor = interleave(tensor, head_dim)
            state[f"layers.{layer}.{ours}"] = tensor
    return {name: tensor.clone() for name, tensor in state.items()}
