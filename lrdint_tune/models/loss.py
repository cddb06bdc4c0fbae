"""The language-model loss from hidden states, without the logits ever existing whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100

# Logits held at a time, in elements: 128 MiB in float32. Rows of a 128k vocabulary then come 256 at a time, still an
# efficient product.
_CHUNK_ELEMENTS = 2**25


def summed_cross_entropy(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """``sum_i -log softmax(h_i W^T)[labels_i]`` over the labelled positions.

    torch's ``linear_cross_entropy`` does the same but returns a bf16 sum for bf16 input: 8 bits for a loss of
    thousands of nats, which no curve can show. Here softmax and sum are float32 whatever the input.

    Args:
        h: ``[B, N, D]``.
        weight: ``[vocab, D]``, of ``h``'s dtype.
        labels: int64 ``[B, N]``, -100 ignored.

    Returns:
        Scalar in nats, float32 (float64 for float64 ``h``).
    """
    # Inside a Function grad mode is always off, so it has to be told.
    return _SummedCrossEntropy.apply(h.flatten(0, 1), weight, labels.flatten(), torch.is_grad_enabled())


@torch.no_grad()
def token_cross_entropy(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``-log softmax(h_i W^T)[labels_i]`` of each labelled position, for evaluation; others cost nothing.

    Args:
        h: ``[B, N, D]``.
        weight: ``[vocab, D]``, of ``h``'s dtype.
        labels: int64 ``[B, N]``, -100 ignored.

    Returns:
        The losses ``[B, N]`` in nats, float32 (float64 for float64 ``h``), and whether the label is the most likely
        token, bool ``[B, N]``; 0 and False where there is no label.
    """
    wide = torch.promote_types(h.dtype, torch.float32)
    where = (labels != IGNORE_INDEX).flatten().nonzero().squeeze(1)
    x, y = h.flatten(0, 1)[where], labels.flatten()[where]
    losses = torch.zeros(labels.numel(), dtype=wide, device=h.device)
    most_likely = torch.zeros(labels.numel(), dtype=torch.bool, device=h.device)
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[0])
    for begin in range(0, len(where), rows):
        part = slice(begin, begin + rows)
        logits = (x[part] @ weight.T).to(wide)
        losses[where[part]] = logits.logsumexp(-1) - logits.gather(1, y[part, None]).squeeze(1)
        most_likely[where[part]] = logits.argmax(-1) == y[part]
    return losses.view_as(labels), most_likely.view_as(labels)


class _SummedCrossEntropy(torch.autograd.Function):
    """Computes the gradients along with the loss, chunk by chunk: the logits are needed once and no chunk is
    recomputed."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, labels: Tensor, training: bool) -> Tensor:
        wide = torch.promote_types(h.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=h.device)
        grad_h = torch.empty_like(h) if training and ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if training and ctx.needs_input_grad[1] else None
        rows = max(1, _CHUNK_ELEMENTS // weight.shape[0])
        for begin in range(0, len(h), rows):
            x, y = h[begin : begin + rows], labels[begin : begin + rows]
            counted = (y != IGNORE_INDEX).to(wide)
            y = y.clamp(min=0)[:, None]
            logits = (x @ weight.T).to(wide)  # [rows, vocab]
            log_z = logits.logsumexp(-1, keepdim=True)
            loss += ((log_z - logits.gather(1, y)).squeeze(1) * counted).sum()
            if grad_h is None and grad_weight is None:
                continue
            # d loss / d logits = softmax - one-hot, in place of the logits
            slope = logits.sub_(log_z).exp_()
            slope.scatter_add_(1, y, torch.full_like(y, -1, dtype=wide))
            slope = slope.mul_(counted[:, None]).to(h.dtype)
            if grad_h is not None:
                grad_h[begin : begin + rows] = slope @ weight
            if grad_weight is not None:
                grad_weight += slope.T @ x
        ctx.save_for_backward(grad_h, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_h, grad_weight = ctx.saved_tensors
        (scale,) = grads
        return (
            None if grad_h is None else (grad_h * scale).to(grad_h.dtype),
            None if grad_weight is None else (grad_weight * scale).to(ctx.weight_dtype),
            None,
            None,
        )
