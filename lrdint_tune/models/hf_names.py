"""Names and element order of every tensor, torchtune <-> Hugging Face.

Two conventions differ. The names are mapped by the tables below. The order of the rotary dimensions differs too:
torchtune (and Meta) rotate neighbouring pairs ``(2i, 2i + 1)`` of a head, Hugging Face rotates ``(i, i + hd / 2)``.
Whatever is in the rotary dimensions of a head (the rows of the query and key projections, and what a method names in
its ``rotary_dims``) is therefore reordered, head by head; everything else is copied. A method's tensors keep their
names under ``self_attn.method``; a tensor of the pretrained model that no table names is an error.

An adapter's tensors follow the name of the module they adapt. LoRA's ``b`` on the query and key projections has its
rows in the projection's order and is reordered with it. QuanTA's tensors are not: they act on axes that cut across the
heads, and no tensors of that form give the update with its rows reordered. They stay in torchtune's order.
"""

from __future__ import annotations

import re

from torch import Tensor

from lrdint_tune.adapters import MLP, TARGETS
from lrdint_tune.attention import METHODS
from lrdint_tune.errors import ConfigError
from lrdint_tune.models.spec import ModelSpec

_MODEL_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "sa_norm.scale": "input_layernorm.weight",
    "attn.q_proj.weight": "self_attn.q_proj.weight",
    "attn.k_proj.weight": "self_attn.k_proj.weight",
    "attn.v_proj.weight": "self_attn.v_proj.weight",
    "attn.output_proj.weight": "self_attn.o_proj.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "mlp.w1.weight": "mlp.gate_proj.weight",
    "mlp.w2.weight": "mlp.down_proj.weight",
    "mlp.w3.weight": "mlp.up_proj.weight",
}
_METHOD_PREFIX, _METHOD_PREFIX_HF = "attn.method.", "self_attn.method."

# The dimensions that hold the rotary dimensions of the heads, for the tensors that have one. A method names its own.
_ROTARY_DIMS = {
    "attn.q_proj.weight": (0,),  # [H * hd, D]
    "attn.k_proj.weight": (0,),  # [K * hd, D]
    "attn.q_proj.adapters.lora.b.weight": (0,),  # [H * hd, r]
    "attn.k_proj.adapters.lora.b.weight": (0,),  # [K * hd, r]
}

# The modules that adapters are attached to.
_ADAPTED = {MLP: "mlp"} | {path: _LAYER_NAMES[f"{path}.weight"].removesuffix(".weight") for path in TARGETS.values()}

_MODEL_NAMES_FROM_HF = {hf: tune for tune, hf in _MODEL_NAMES.items()}
_LAYER_NAMES_FROM_HF = {hf: tune for tune, hf in _LAYER_NAMES.items()}
_ADAPTED_FROM_HF = {hf: tune for tune, hf in _ADAPTED.items()}
_TUNE_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def tune_to_hf(name: str, spec: ModelSpec) -> str:
    """The Hugging Face name of the tensor that the model's state dict calls ``name``.

    Raises:
        ConfigError: the name belongs to no tensor of a model with this spec.
    """
    if name in _MODEL_NAMES:
        return _MODEL_NAMES[name]
    layer, tail = _split_layer(name, _TUNE_LAYER, spec)
    if tail.startswith(_METHOD_PREFIX) and spec.method != "none":
        return f"model.layers.{layer}.{_METHOD_PREFIX_HF}{tail.removeprefix(_METHOD_PREFIX)}"
    hf_tail = _adapter_name(tail, _ADAPTED, spec) or _LAYER_NAMES.get(tail)
    if hf_tail is None:
        raise _unknown(name)
    return f"model.layers.{layer}.{hf_tail}"


def hf_to_tune(name: str, spec: ModelSpec) -> str:
    """The state-dict name of the tensor that Hugging Face calls ``name``: the inverse of :func:`tune_to_hf`.

    Raises:
        ConfigError: the name belongs to no tensor of a model with this spec.
    """
    if name in _MODEL_NAMES_FROM_HF:
        return _MODEL_NAMES_FROM_HF[name]
    layer, tail = _split_layer(name, _HF_LAYER, spec)
    if tail.startswith(_METHOD_PREFIX_HF) and spec.method != "none":
        return f"layers.{layer}.{_METHOD_PREFIX}{tail.removeprefix(_METHOD_PREFIX_HF)}"
    tune_tail = _adapter_name(tail, _ADAPTED_FROM_HF, spec) or _LAYER_NAMES_FROM_HF.get(tail)
    if tune_tail is None:
        raise _unknown(name)
    return f"layers.{layer}.{tune_tail}"


def to_hf(name: str, tensor: Tensor, spec: ModelSpec) -> tuple[str, Tensor]:
    """Name and element order of Hugging Face for a tensor of the model's state dict.

    Args:
        name: state-dict name.
        tensor: any shape, dtype and device (meta too).
        spec: the model; its ``head_dim`` divides the reordered dimension.

    Returns:
        The Hugging Face name and the tensor, shape and dtype unchanged.

    Raises:
        ConfigError: the name belongs to no tensor of a model with this spec.
    """
    for dim in rotary_dims(name, spec):
        tensor = _interleaved_to_halves(tensor, dim, spec.head_dim)
    return tune_to_hf(name, spec), tensor


def to_tune(name: str, tensor: Tensor, spec: ModelSpec) -> tuple[str, Tensor]:
    """State-dict name and element order for a tensor of a Hugging Face folder: the inverse of :func:`to_hf`."""
    tune_name = hf_to_tune(name, spec)
    for dim in rotary_dims(tune_name, spec):
        tensor = _halves_to_interleaved(tensor, dim, spec.head_dim)
    return tune_name, tensor


def rotary_dims(name: str, spec: ModelSpec) -> tuple[int, ...]:
    """The dimensions of the tensor with this state-dict name that are reordered."""
    match = _TUNE_LAYER.fullmatch(name)
    if match is None:
        return ()
    if match[2].startswith(_METHOD_PREFIX):
        return METHODS[spec.method].rotary_dims.get(match[2].removeprefix(_METHOD_PREFIX), ())
    return _ROTARY_DIMS.get(match[2], ())


def stays_float32(name: str) -> bool:
    """Whether the tensor with this state-dict name is float32 in every file, whatever the dtype of the rest.

    The values of lambda are: bfloat16 has 8 bits of mantissa, and a lambda near 1 would move in steps of 1/256.
    """
    return ".attn.method.lam." in name


def _adapter_name(tail: str, modules: dict[str, str], spec: ModelSpec) -> str | None:
    """The other side's name of an adapter's tensor, None for any other tensor."""
    module, mark, tensor = tail.partition(".adapters.")
    known = module in modules and tensor.split(".")[0] in [adapter["type"] for adapter in spec.adapters]
    return f"{modules[module]}{mark}{tensor}" if known else None


def _split_layer(name: str, pattern: re.Pattern[str], spec: ModelSpec) -> tuple[int, str]:
    match = pattern.fullmatch(name)
    if match is None or int(match[1]) >= spec.num_layers:
        raise _unknown(name)
    return int(match[1]), match[2]


def _unknown(name: str) -> ConfigError:
    return ConfigError(f"tensor {name!r}: no such tensor in this model; check the method and the number of layers")


def _interleaved_to_halves(tensor: Tensor, dim: int, head_dim: int) -> Tensor:
    pairs = tensor.unflatten(dim, (-1, head_dim // 2, 2))  # head, pair, member
    return pairs.transpose(dim + 1, dim + 2).flatten(dim, dim + 2).contiguous()


def _halves_to_interleaved(tensor: Tensor, dim: int, head_dim: int) -> Tensor:
    halves = tensor.unflatten(dim, (-1, 2, head_dim // 2))  # head, member, pair
    return halves.transpose(dim + 1, dim + 2).flatten(dim, dim + 2).contiguous()
