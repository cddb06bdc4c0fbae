"""How much arithmetic a training step takes, for the TFLOP/s of the log."""

from __future__ import annotations

from torch import nn

from lrdint_tune.adapters import named_adapters
from lrdint_tune.models.decoder import LlamaDecoder, is_new_tensor


def training_flops_per_token(model: LlamaDecoder, seq_len: int, *, causal: bool = False) -> float:
    """Floating-point operations per token of one forward and backward pass over a sequence of one document.

    A weight of a matrix product costs 2 in the forward pass, 2 for the gradient of its input and, if it is trained, 2
    for its own. Attention costs ``4 N H hd`` forward and twice that backward for each map, counted over the full ``N x
    N`` map as torch's FLOP counter does, or with ``causal`` over its lower triangle, which is what a fused kernel
    really computes: ``(N + 1) / 2`` keys a row. Recomputation is not counted.

    Args:
        model: names, shapes and ``requires_grad`` are read; sharded and meta parameters are fine.
        seq_len: ``N``.
        causal: whether a row's product with later keys is left out.
    """
    spec = model.spec
    total = 0.0
    for name, parameter in model.named_parameters():
        is_lookup = name.startswith("tok_embeddings.") and not spec.tie_word_embeddings
        if parameter.dim() >= 2 and not is_lookup and not is_new_tensor(name):
            total += (6 if parameter.requires_grad else 4) * parameter.numel()
    for _, adapter in named_adapters(model):
        total += _passes(adapter) * adapter.products_per_token
    for method in model.methods():
        total += _passes(method) * method.products_per_token(seq_len)
    maps = sum(method.num_maps for method in model.methods())
    keys_per_row = (seq_len + 1) / 2 if causal else seq_len
    return total + maps * 12.0 * keys_per_row * spec.num_heads * spec.head_dim


def _passes(module: nn.Module) -> int:
    return 6 if any(p.requires_grad for p in module.parameters()) else 4
