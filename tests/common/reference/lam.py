"""The lambda of every token and head.

learned      p
annealed     (1 - a) (t/T) lam_init + a p, a = min(1, t/T)
exponential  exp(a1 . b1) - exp(a2 . b2) + lam_init
sigmoid      sigmoid(x W)
gated        tanh(x W)
fixed        lam_init
"""

import math
from typing import Any

import torch
from torch import Tensor

from tests.common.reference.parts import Weights

DEFAULT_FORM = {"diff": "learned", "dint": "learned", "difflora": "fixed"} | dict.fromkeys(
    ("daa", "dex", "diffq", "diffk", "diffv"), "annealed"
)


def lambda_form(options: dict[str, Any]) -> str:
    return options.get("lam") or DEFAULT_FORM[options["method"]]


def lambda_init(options: dict[str, Any], layer: int) -> float:
    """The constant of the form, `layer` counted from 0."""
    given = options.get("lam_init")
    if given is not None:
        return given
    return {"learned": 0.0, "annealed": 0.8, "fixed": 0.1, "exponential": 0.8 - 0.6 * math.exp(-0.3 * layer)}[
        lambda_form(options)
    ]


def reference_lambda(
    x: Tensor, weights: Weights, options: dict[str, Any], heads: int, *, layer: int = 0, step: int = 0
) -> Tensor:
    """[B, heads, N]. x [B, N, D]; `heads` is H, or K where lambda belongs to the key/value heads."""
    form = lambda_form(options)
    sharing = options.get("lam_sharing") or ("layer" if form == "exponential" else "head")
    count = heads if sharing == "head" else 1
    if form == "fixed":
        lam = torch.tensor([lambda_init(options, layer)], dtype=torch.float32).to(x.dtype)  # lambda is float32
    elif form == "learned":
        lam = weights["lam.value"].reshape(count)
    elif form == "annealed":
        ramp = step / options.get("anneal_steps", 1000)
        a = min(1.0, ramp)
        lam = (1 - a) * ramp * lambda_init(options, layer) + a * weights["lam.value"].reshape(count)
    elif form == "exponential":
        a1, b1, a2, b2 = (weights[f"lam.{name}"].reshape(count, -1) for name in ("a1", "b1", "a2", "b2"))
        one = torch.stack([torch.dot(a1[i], b1[i]).exp() for i in range(count)])
        two = torch.stack([torch.dot(a2[i], b2[i]).exp() for i in range(count)])
        lam = one - two + lambda_init(options, layer)
    elif form in ("sigmoid", "gated"):
        weight = weights["lam.weight"].reshape(count, x.shape[-1])
        logits = torch.stack([x @ weight[i] for i in range(count)], dim=1)
        sigmoid = 1 / (1 + torch.exp(-logits))
        per_token = sigmoid if form == "sigmoid" else 2 / (1 + torch.exp(-2 * logits)) - 1
        return per_token.expand(-1, heads, -1)
    else:
        raise ValueError(f"unknown lambda form {form!r}")
    return lam[None, :, None].expand(x.shape[0], heads, x.shape[1])
