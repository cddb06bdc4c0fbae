"""Where the self-attention, its projections and the FFN of each supported ``transformers`` model are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lrdint_tune.attention import AttentionShape
from lrdint_tune.errors import ConfigError

ENCODER, DECODER = "encoder", "decoder"


@dataclass(frozen=True)
class HostProjection:
    """One of q and v, possibly a part of a fused projection.

    Attributes:
        module: ``nn.Linear``, or GPT-2's ``Conv1D``, whose weight is ``[in, out]``.
        features: which of its outputs.
    """

    module: nn.Module
    features: slice = field(default_factory=lambda: slice(None))

    @property
    def weight(self) -> Tensor:
        """``[out, in]``."""
        weight: Any = self.module.weight
        return (weight.T if isinstance(self.module, Conv1D) else weight)[self.features]

    def __call__(self, x: Tensor) -> Tensor:
        """``x W + b`` with the bias, without the module's hooks; ``[..., in]`` -> ``[..., out]``."""
        bias: Any = self.module.bias
        return F.linear(x, self.weight, None if bias is None else bias[self.features])


@dataclass(frozen=True)
class HostLayer:
    """One self-attention layer.

    Attributes:
        stack: ``encoder | decoder``.
        attention: the module that calls the attention interface.
        block: the module that holds all of the attention's weights, its output projection too.
        ffn_in, ffn_out: the FFN's input is that of ``ffn_in``, its output that of ``ffn_out``.
    """

    stack: str
    shape: AttentionShape
    attention: nn.Module
    block: nn.Module
    query: HostProjection
    value: HostProjection
    ffn_in: nn.Module
    ffn_out: nn.Module


@dataclass(frozen=True)
class Architecture:
    """A supported class.

    Attributes:
        layers: the model's self-attention layers, encoder first.
        head: the parameters of the task's head begin with this.
        stacks: which it has.
        rotary: whether its queries come rotated.
        task: ``lm``, ``classification`` or ``seq2seq``.
    """

    name: str
    layers: Callable[[Any], Iterator[HostLayer]]
    head: str
    stacks: tuple[str, ...]
    rotary: bool = False
    task: str = "lm"


def _gpt2(model: Any) -> Iterator[HostLayer]:
    for i, block in enumerate(model.transformer.h):
        attention = block.attn
        d, heads = attention.embed_dim, attention.num_heads
        yield HostLayer(
            DECODER,
            AttentionShape(d, heads, heads, attention.head_dim, layer_index=i),
            attention=attention,
            block=attention,
            query=HostProjection(attention.c_attn, slice(0, d)),
            value=HostProjection(attention.c_attn, slice(2 * d, 3 * d)),
            ffn_in=block.mlp,
            ffn_out=block.mlp,
        )


def _roberta(model: Any) -> Iterator[HostLayer]:
    for i, layer in enumerate(model.roberta.encoder.layer):
        attention = layer.attention.self
        heads = attention.num_attention_heads
        yield HostLayer(
            ENCODER,
            AttentionShape(attention.query.in_features, heads, heads, attention.attention_head_size, layer_index=i),
            attention=attention,
            block=layer.attention,
            query=HostProjection(attention.query),
            value=HostProjection(attention.value),
            ffn_in=layer.intermediate,
            ffn_out=layer.output.dense,
        )


def _bart(model: Any) -> Iterator[HostLayer]:
    for stack, layers in ((ENCODER, model.model.encoder.layers), (DECODER, model.model.decoder.layers)):
        for i, layer in enumerate(layers):
            attention = layer.self_attn
            heads = attention.num_heads
            yield HostLayer(
                stack,
                AttentionShape(attention.embed_dim, heads, heads, attention.head_dim, layer_index=i),
                attention=attention,
                block=attention,
                query=HostProjection(attention.q_proj),
                value=HostProjection(attention.v_proj),
                ffn_in=layer.fc1,
                ffn_out=layer.fc2,
            )


def _llama(model: Any) -> Iterator[HostLayer]:
    config = model.config
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        yield HostLayer(
            DECODER,
            AttentionShape(
                config.hidden_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                attention.head_dim,
                layer_index=i,
            ),
            attention=attention,
            block=attention,
            query=HostProjection(attention.q_proj),
            value=HostProjection(attention.v_proj),
            ffn_in=layer.mlp,
            ffn_out=layer.mlp,
        )


ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("GPT2LMHeadModel", _gpt2, head="lm_head.", stacks=(DECODER,)),
        Architecture(
            "RobertaForSequenceClassification", _roberta, head="classifier.", stacks=(ENCODER,), task="classification"
        ),
        Architecture("BartForConditionalGeneration", _bart, head="lm_head.", stacks=(ENCODER, DECODER), task="seq2seq"),
        Architecture("LlamaForCausalLM", _llama, head="lm_head.", stacks=(DECODER,), rotary=True),
    )
}


def architecture_of(model: nn.Module) -> Architecture:
    """The architecture of ``model`` (or of what its class derives from).

    Raises:
        ConfigError: none of the supported ones, or one with a sliding window.
    """
    name = type(model).__name__
    found = next((ARCHITECTURES[c.__name__] for c in type(model).__mro__ if c.__name__ in ARCHITECTURES), None)
    if found is None:
        # transformers' own test of whether a class reads its attention function from the registry.
        interface = isinstance(model, PreTrainedModel) and type(model)._can_set_attn_implementation()
        reason = "is not supported" if interface else "has no attention interface in transformers"
        raise ConfigError(f"model={name}: {reason}; use one of {', '.join(ARCHITECTURES)}")
    window = getattr(model.config, "sliding_window", None)
    if window is not None:
        raise ConfigError(f"model.sliding_window={window}: windows are not supported; set it to null")
    return found
