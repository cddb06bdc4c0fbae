"""Every method written straight from its formula, with every N x N map in memory.

This is what the fast code is compared with, so it shares nothing with it: raw weight tensors in, loops over heads,
maps as explicit matrices, documents as explicit integer labels. Use float64.

Symbols: B batch, N rows, D embed dim, H query heads, K key/value heads, hd head dim, r rank.
"""

from typing import Any

import torch
from torch import Tensor

from tests.common.reference.differential import daa, dex, diff, diffk, difflora, diffq, diffv, dint, none
from tests.common.reference.lam import reference_lambda
from tests.common.reference.lmam import lmam
from tests.common.reference.parts import Llama3Scaling, Rows, Sublayer, Weights, rope, rope_frequencies

METHODS = {
    function.__name__: function for function in (none, diff, dint, daa, dex, diffq, diffk, diffv, difflora, lmam)
}


def reference_attention(x: Tensor, weights: Weights, rows: Rows, options: dict[str, Any], **sizes: Any) -> Tensor:
    """The whole attention module, from x [B, N, D] to the output projection's result [B, N, D].

    options: the builder's, `method` among them. sizes: num_heads, num_kv_heads and what else a Sublayer takes.
    """
    s = Sublayer(x, weights, rows, options, **sizes)
    return torch.cat(METHODS[options["method"]](s), dim=-1) @ weights["wo"].T


__all__ = [
    "METHODS",
    "Llama3Scaling",
    "Rows",
    "Sublayer",
    "Weights",
    "reference_attention",
    "reference_lambda",
    "rope",
    "rope_frequencies",
]
