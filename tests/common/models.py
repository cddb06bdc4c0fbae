"""Tiny models and attention modules, built through the public component builder.

embed_dim (24) is not num_heads * head_dim (32), and no two sizes are equal: a swapped axis fails instead of passing.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lrdint_tune.models import llama3_2
from lrdint_tune.models.decoder import LlamaDecoder
from tests.common import reference

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
    """Move every lambda parameter away from 0, differently in every head and layer, with both signs; in place."""
    with torch.no_grad():
        for name, parameter in model.adapter_parameters().items():
            if name.endswith("lam.value"):
                values = torch.empty_like(parameter).uniform_(low, high)
                values[1::2] *= -1
                parameter.copy_(values)
    return model


def attention_of(model: LlamaDecoder, layer: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """One attention module in `dtype`, with the rotation in that dtype too."""
    attention = model.layers[layer].attn.to(dtype)
    attention.pos_embeddings = Rope64()
    return attention


def raw_weights(attention: nn.Module, lam: Tensor | None = None) -> tuple[reference.Weights, dict[str, nn.Parameter]]:
    """Copies of a module's tensors as the reference wants them, and the module's parameters by the same names.

    The copies are leaves that require gradients, so that gradients can be compared name by name.
    """
    names = {"wq": "q_proj.weight", "wk": "k_proj.weight", "wv": "v_proj.weight", "wo": "output_proj.weight"}
    for which in ("q2", "k2"):
        names[f"{which}.weight"] = f"method.{which}.weight"
        names[f"{which}.down"] = f"method.{which}.down.weight"
        names[f"{which}.up"] = f"method.{which}.up"
    names["lam"] = "method.lam.value"
    parameters = dict(attention.named_parameters())
    assert set(parameters) <= set(names.values()), set(parameters) - set(names.values())
    own = {short: parameters[name] for short, name in names.items() if name in parameters}
    weights = {short: p.detach().to(torch.float64).clone().requires_grad_() for short, p in own.items()}
    if lam is not None:
        weights["lam"] = lam
    return weights, own
