"""stories260K: a real pretrained Llama of 260,032 parameters that runs in milliseconds (its files are not shipped)."""

import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrdint_tune.models import llama3_2
from lrdint_tune.models.decoder import LlamaDecoder

ROPE_BASE = 10_000
MODEL_FILE = "stories260k/stories260K.bin"
TOKENIZER_FILE = "stories260k/tok512.model"
PAGE_FILE = "stories260k/stories260K.md"


def read_stories260k(path: Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Builder arguments and fp32 state dict (torchtune names; Q/K rows are interleaved already) of the .bin file.

    Layout: seven little-endian int32 (dim, hidden, layers, heads, kv heads, vocab, sequence), then float32 arrays in
    the order read below, each holding all layers in turn. The RoPE tables at the end are not needed.
    """
    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("<7i", data[:28])
    values = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32)
    kv_dim = dim // heads * kv_heads
    offset = 0

    def take(*shape: int) -> Tensor:
        nonlocal offset
        count = torch.Size(shape).numel()
        array = values[offset : offset + count].view(shape).clone()
        offset += count
        return array

    state = {"tok_embeddings.weight": take(vocab, dim)}
    for name, shape in (
        ("sa_norm.scale", (dim,)),
        ("attn.q_proj.weight", (dim, dim)),
        ("attn.k_proj.weight", (kv_dim, dim)),
        ("attn.v_proj.weight", (kv_dim, dim)),
        ("attn.output_proj.weight", (dim, dim)),
        ("mlp_norm.scale", (dim,)),
        ("mlp.w1.weight", (hidden, dim)),
        ("mlp.w2.weight", (dim, hidden)),
        ("mlp.w3.weight", (hidden, dim)),
    ):
        for layer, tensor in enumerate(take(layers, *shape)):
            state[f"layers.{layer}.{name}"] = tensor
    state["norm.scale"] = take(dim)
    arguments = {
        "vocab_size": vocab,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "embed_dim": dim,
        "max_seq_len": length,
        "intermediate_dim": hidden,
    }
    return arguments, state


def stories260k(shared_data: Path, **options: Any) -> LlamaDecoder:
    """The pretrained model with any method on top (`method=`, `rank=`, ...); new tensors keep their random start."""
    sizes, state = read_stories260k(shared_data / MODEL_FILE)
    arguments: dict[str, Any] = {**sizes, **options}
    model = llama3_2(**arguments, rope_base=ROPE_BASE, norm_eps=1e-5, scale_factor=1, tie_word_embeddings=True)
    missing, unexpected = model.load_state_dict(state, strict=False)
    new = set(model.adapter_parameters()) | {name for name, _ in model.named_buffers()}
    assert not unexpected and set(missing) <= new, (missing, unexpected)
    return model


def greedy_sample(shared_data: Path) -> str:
    """The greedy (temperature 0) text that the model's author printed."""
    page = (shared_data / PAGE_FILE).read_text(encoding="utf-8")
    block = page.split("-t 0.0\n", 1)[1].split("\n```", 1)[0]
    return block
