"""Putting a method into the self-attention of a ``transformers`` model.

Two ways in. The attention function that a model takes from transformers' registry: it hands over the projected ``q``,
``k``, ``v``, and whatever has a method is computed by it. And, for DiffV, a hook on the value projection, so that the
host caches ``v'``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lrdint_tune.attention import METHODS, AttentionMethod, build_method, method_options
from lrdint_tune.attention.lambdas import LambdaForm
from lrdint_tune.errors import ConfigError
from lrdint_tune.hosts.adapters import add_adapters
from lrdint_tune.hosts.architectures import ENCODER, Architecture, HostLayer, architecture_of
from lrdint_tune.hosts.context import HostContext, ValueContext

IMPLEMENTATION = "lrdint_tune"
SUPPORTED = ("none", "daa", "dex", "diffq", "diffv", "lmam")
BOTH = "both"


@dataclass
class Slot:
    """What the attention function must know of the module that calls it; ``x`` is its input during a forward."""

    layer: HostLayer
    x: Tensor | None = None


@dataclass(frozen=True)
class Attached:
    """What :func:`attach` did to a model: its arguments with every default filled in."""

    architecture: Architecture
    method: str
    where: str
    options: dict[str, Any]
    adapters: list[dict[str, Any]] = field(default_factory=list)

    def layers(self, model: nn.Module) -> list[HostLayer]:
        """The layers that carry the method."""
        return [h for h in self.architecture.layers(model) if self.where in (h.stack, BOTH)]


def attach(
    model: PreTrainedModel,
    method: str,
    *,
    where: str | None = None,
    adapters: Sequence[dict[str, Any]] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Give every self-attention of ``model`` the method ``method``, in place.

    Each becomes the child ``method`` of its attention module, on the device and in the dtype of the model (λ in
    float32). The other parameters keep their names; which are trained is left as it is, see
    :func:`~lrdint_tune.hosts.model.set_trainable`. Cross-attention stays as it is.

    Args:
        model: ``GPT2LMHeadModel``, ``RobertaForSequenceClassification``, ``BartForConditionalGeneration`` or
            ``LlamaForCausalLM``. Its attention is computed by torch's ``scaled_dot_product_attention`` from now on.
        method: ``none | daa | dex | diffq | diffv | lmam``.
        where: ``encoder | decoder | both``, for BART; None takes ``encoder`` for ``lmam`` (seed 004) and ``both`` for
            the others.
        adapters: as the models of this package take them; ``bottleneck`` only. They go into the same layers.
        options: of the method.

    Returns:
        ``model``.

    Raises:
        ConfigError: an unsupported model, method or option, or a model that has a method already.
    """
    architecture = architecture_of(model)
    if attached(model) is not None:
        raise ConfigError(f"method={method!r}: the model has a method already; attach to a fresh model")
    if method in METHODS and method not in SUPPORTED:
        raise ConfigError(
            f"method={method!r}: not for transformers models, whose caches have no place for keys or sums of its own; "
            f"use one of {', '.join(SUPPORTED)}, or a model of lrdint_tune.models"
        )
    options = {**method_options(method), **options}
    if architecture.rotary and method == "daa" and options["position"] == "before":
        raise ConfigError(
            f"position='before': {architecture.name} hands over rotated queries; set position=after, or use a model of "
            "lrdint_tune.models"
        )
    if architecture.rotary and method == "diffq":
        raise ConfigError(
            f"method='diffq': its second queries need the RoPE that {architecture.name} applies before its attention "
            "function; use a model of lrdint_tune.models"
        )
    state = Attached(architecture, method, _where(where, architecture, method), options)
    layers = state.layers(model)
    # All are built before any is put in place: a refusal leaves the model as it was.
    built = [_build(method, layer, options) for layer in layers]
    checked = add_adapters(layers, adapters)
    for layer, module in zip(layers, built, strict=True):
        _put(layer, module)
    if method != "diffv":
        model.set_attn_implementation(IMPLEMENTATION)
    cast(Any, model).lrdint_tune = replace(state, adapters=checked)
    return model


def attached(model: nn.Module) -> Attached | None:
    """What was attached to ``model``."""
    return getattr(model, "lrdint_tune", None)


def _where(where: str | None, architecture: Architecture, method: str) -> str:
    stacks = architecture.stacks
    valid = (*stacks, BOTH) if len(stacks) > 1 else stacks
    if where is None:
        return stacks[0] if len(stacks) == 1 else ENCODER if method == "lmam" else BOTH
    if where not in valid:
        raise ConfigError(f"where={where!r}: {architecture.name} has no such part; choose from {', '.join(valid)}")
    return where


def _build(method: str, layer: HostLayer, options: dict[str, Any]) -> AttentionMethod:
    weight = layer.value.weight
    with torch.device(weight.device):
        module = build_method(method, layer.shape, **options)
    for name, parameter in module.named_parameters():
        owner = module.get_submodule(name.rpartition(".")[0])
        if not isinstance(owner, LambdaForm):
            parameter.data = parameter.data.to(weight.dtype)
    return module.train(layer.attention.training)


def _put(layer: HostLayer, method: AttentionMethod) -> None:
    attention = layer.attention
    attention.method = method
    if method.name == "diffv":
        layer.value.module.register_forward_hook(partial(_replace_values, layer, method))
        return
    cast(Any, attention).slot = Slot(layer)
    attention.register_forward_pre_hook(_keep_input, with_kwargs=True)


def _keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cast(Slot, module.slot).x = args[0] if args else kwargs["hidden_states"]


def _replace_values(
    layer: HostLayer, method: AttentionMethod, module: nn.Module, args: tuple[Tensor], output: Tensor
) -> Tensor:
    features = layer.value.features
    v = output[..., features].unflatten(-1, (layer.shape.num_kv_heads, -1))
    new = method(ValueContext(args[0], v, layer=layer)).transpose(1, 2).flatten(2).to(output.dtype)
    return torch.cat([output[..., : features.start or 0], new], dim=-1)  # the values are the last of fused features


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: ``[B, heads, N, hd]`` in, ``[B, N, H, hd]`` and no weights out."""
    slot: Slot | None = getattr(module, "slot", None)
    if slot is None:  # cross-attention, or the stack without a method
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("cache") is not None:
        raise ConfigError("generate: continuous batching is not supported with a method; use generate()")
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ConfigError(f"attention_mask={attention_mask.dtype} [B, 1, N, M]: must be bool, True where allowed")
    method = cast(AttentionMethod, module.method)
    if method.cache_refusal is not None and key.shape[2] != query.shape[2]:
        raise ConfigError(method.cache_refusal)
    x, slot.x = slot.x, None
    assert x is not None
    causal = kwargs.get("is_causal")
    ctx = HostContext(
        x,
        query,
        key,
        value,
        layer=slot.layer,
        mask=attention_mask,
        causal=bool(module.is_causal if causal is None else causal),
        scale=scaling,
        dropout=dropout,
    )
    return method(ctx).to(value.dtype).transpose(1, 2).contiguous(), None


def _mask(*, q_length: int, kv_length: int, q_offset: Any = 0, **kwargs: Any) -> Tensor | None:
    """transformers' mask interface: bool ``[B, 1, N, M]``, or None where ``N = M`` and a flag says it all."""
    if isinstance(q_offset, Tensor):
        raise ConfigError("cache_implementation='static': not supported with a method; use a dynamic cache")
    allow = kwargs.pop("allow_is_causal_skip", True) and q_length == kv_length
    return sdpa_mask(q_length=q_length, kv_length=kv_length, q_offset=q_offset, allow_is_causal_skip=allow, **kwargs)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
