"""Write a Llama model in a GGUF file as a Hugging Face folder with float32 weights.

Needs the ``gguf`` package only. transformers reads GGUF files too, but it asks for ``accelerate``, does not save what
it read, and leaves out the split of numbers into digits that this model was trained with (see ``tokenizer_of``).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_CONTROL_TOKEN = 3  # gguf's TokenType.CONTROL


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write ``model.safetensors``, ``config.json``, the tokenizer's files and ``generation_config.json``.

    The model must be a Llama with tied embeddings, no RoPE scaling and the SmolLM tokenizer.

    Args:
        gguf: the GGUF file.
        folder: an existing folder; files of the same names are overwritten.
    """
    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:
        # A float32 tensor comes back as a read-only view of the mapped file, hence the copy.
        weight = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        stem = tensor.name.removesuffix(".weight")
        kind = stem.rpartition(".")[2]
        if kind in heads:
            weight = half_split_rows(weight, heads[kind])
        tensors[hf_name(stem)] = weight
    # transformers reads a safetensors file only when its metadata names a framework.
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer_of(fields).save(str(folder / "tokenizer.json"))
    for name, content in (
        ("config.json", config_of(fields)),
        ("tokenizer_config.json", tokenizer_config_of(fields)),
        ("generation_config.json", _token_ids(fields)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    # safetensors makes its file private to the user; the others follow the umask.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def hf_name(stem: str) -> str:
    """Hugging Face name of a GGUF tensor: ``blk.3.attn_q`` -> ``model.layers.3.self_attn.q_proj.weight``."""
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.weight"
    _, layer, kind = stem.split(".")
    return f"model.layers.{layer}.{_BLOCK_NAMES[kind]}.weight"


def half_split_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection from GGUF's order to Hugging Face's.

    RoPE turns pairs of rows of a head. GGUF keeps a pair together (rows 2i and 2i + 1, as Meta does); Hugging Face
    keeps it half a head apart (rows i and i + hd/2).

    Args:
        weight: [heads * hd, D].
        heads: number of heads.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])  # [heads, hd/2, 2, D]
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def config_of(fields: dict[str, Any]) -> dict[str, Any]:
    """``config.json``, with RoPE spelled as transformers 5 does (``rope_parameters``) and as others read it."""
    width, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    rope_base = fields["llama.rope.freq_base"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": width,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        # Seven digits: the file stores a float32, and 1e-05 is meant by its 9.999999747378752e-06.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_theta": rope_base,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_base},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "float32",
        **_token_ids(fields),
    }


def tokenizer_of(fields: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer, which adds no token of its own at the start or the end of a text.

    GGUF stores the vocabulary and the merges but only the name of the way a text is cut up beforehand. ``smollm``
    means: every digit by itself, then GPT-2's pattern on the stretches between.
    """
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    return tokenizer


def tokenizer_config_of(fields: dict[str, Any]) -> dict[str, Any]:
    """``tokenizer_config.json``: the special tokens by name, and the chat template."""
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }


def _token_ids(fields: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }
