"""Rotary embeddings whose rotation is one complex product."""

from __future__ import annotations

import torch
from torch import Tensor
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.modules import RotaryPositionalEmbeddings


class ComplexRotation:
    """Mixed into torchtune's RoPE modules: same cache of angles, same bits, fewer passes over memory.

    torchtune spells the rotation out on the strided halves of each pair, and its backward fills a full-size zero tensor
    per half. A differential method rotates two more streams per layer; that was the largest part of its cost outside
    the attention kernels.
    """

    cache: Tensor

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        """
        Args:
            x: ``[B, N, heads, hd]``; features ``2i`` and ``2i + 1`` are a pair (Meta order).
            input_pos: int ``[B, N]`` or ``[N]``; None counts from 0.

        Returns:
            ``[B, N, heads, hd]`` in ``x.dtype``, computed in float32 (float64 for float64 ``x``).
        """
        angles = self.cache[: x.shape[1]] if input_pos is None else self.cache[input_pos]
        if torch.compiler.is_compiling():  # torch's compiler writes no code for complex numbers
            cos, sin = _at_least_float32(angles).unsqueeze(-3).unbind(-1)  # [N or B N, 1, hd / 2]
            first, second = _at_least_float32(x).unflatten(-1, (-1, 2)).unbind(-1)
            turned = first * cos - second * sin, second * cos + first * sin
            return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)
        turns = torch.view_as_complex(_at_least_float32(angles)).unsqueeze(-2)  # cos + i sin, [N or B N, 1, hd / 2]
        pairs = torch.view_as_complex(_at_least_float32(x).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


class PlainRoPE(ComplexRotation, RotaryPositionalEmbeddings):
    """Llama 2 and 3."""


class ScaledRoPE(ComplexRotation, Llama3ScaledRoPE):
    """Llama 3.1 and later, with its frequency scaling."""


def _at_least_float32(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))  # there are no 16-bit complex numbers to speak of
