"""Tiny models and attention modules, built through the public component builder.

embed_dim (24) is not num_heads * head_dim (32), and no two sizes are equal: a swapped axis fails instead of passing.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lrdint_tune.attention import Backend
from lrdint_tune.models import llama3_2
from lrdint_tune.models.decoder import LlamaDecoder
from tests.common import reference
from tests.common.cases import KV_HEADS, STEP, MethodCase

ROPE_BASE = 10_000
TINY: dict[str, Any] = {
    "vocab_size": 61,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 24,
    "head_dim": 8,
    "max_seq_len": 64,
    "intermediate_dim": 40,
    "rope_base": ROPE_BASE,
    "norm_eps": 1e-5,
    "scale_factor": 1,
}


class Rope64(nn.Module):
    """The interleaved rotation in the input's own dtype (torchtune's module works in float32)."""

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        """x [B, N, heads, hd]; input_pos [B, N], [N] or None for 0 .. N-1."""
        if input_pos is None:
            input_pos = torch.arange(x.shape[1])
        return reference.rope(x, input_pos.expand(x.shape[0], x.shape[1]), ROPE_BASE)


def tiny_model(method: str = "none", **options: Any) -> LlamaDecoder:
    """A two-layer decoder; sizes of TINY may be overridden among `options`, the rest goes to the method."""
    return llama3_2(**{**TINY, "method": method, **options})


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the new tensors."""
    return {name: tensor for name, tensor in model.state_dict().items() if ".method." not in name}


def wake(model: LlamaDecoder, low: float = 0.2, high: float = 0.8) -> LlamaDecoder:
    """Move what starts at a special value away from it, differently in every head and layer; in place.

    Lambda leaves 0 with both signs, matrices leave the identity, zero factors and norms their start, LMAM's `b` 0.
    """
    with torch.no_grad():
        for name, parameter in model.adapter_parameters().items():
            tail = name.rpartition(".attn.method.")[2]  # an adapter's name stays whole
            if tail == "lam.value":
                parameter.uniform_(low, high)
                parameter[1::2] *= -1
            elif tail.startswith("lam."):  # the vectors of `exponential`, the weight of `sigmoid` and `gated`
                parameter.normal_(std=0.4)
            elif tail in ("w_daa", "w_d", "w_dex"):
                parameter.add_(torch.randn_like(parameter), alpha=0.5 * parameter.shape[-1] ** -0.5)
            elif tail in ("q1.up", "k1.up"):
                parameter.normal_(std=0.3)
            elif tail in ("b", "w"):
                parameter.normal_()
            elif tail == "norm.weight":
                parameter.uniform_(0.5, 1.5)
    return model


def woken_model(case: MethodCase, heads: str, **sizes: Any) -> LlamaDecoder:
    """The model of a case with its branch awake and its schedule in the middle."""
    model = wake(tiny_model(**case.options, num_kv_heads=KV_HEADS[heads], **sizes))
    model.advance_schedule(STEP)
    if case.selected is not None:
        for layer in model.layers:
            layer.attn.method.selected.copy_(torch.tensor(case.selected))
    return model


def set_backend(model: LlamaDecoder, backend: str) -> LlamaDecoder:
    """The same weights under another kernel."""
    for layer in model.layers:
        layer.attn.backend = Backend.parse(backend)
    return model


def attention_of(model: LlamaDecoder, layer: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """One attention module in `dtype`, with the rotation in that dtype too."""
    attention = model.layers[layer].attn.to(dtype)
    attention.pos_embeddings = Rope64()
    return attention


def raw_weights(attention: nn.Module) -> tuple[reference.Weights, dict[str, nn.Parameter]]:
    """Float64 copies of a module's tensors as the reference wants them, and the module's parameters by the same names.

    Copies of parameters are leaves that require gradients, so that gradients can be compared name by name.
    """
    base = {"q_proj.weight": "wq", "k_proj.weight": "wk", "v_proj.weight": "wv", "output_proj.weight": "wo"}
    parameters = {base.get(name) or name.removeprefix("method."): p for name, p in attention.named_parameters()}
    weights = {
        base.get(name) or name.removeprefix("method."): tensor.detach().to(torch.float64, copy=True)
        for name, tensor in attention.state_dict().items()
    }
    for name in parameters:
        weights[name].requires_grad_()
    return weights, parameters
