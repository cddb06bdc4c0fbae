"""What every method is made of, with each N x N map as an explicit matrix."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]
"""wq [H*hd, D], wk, wv [K*hd, D], wo [D, H*hd], and a method's own tensors under their names in the state dict,
without the prefix up to `method.`."""


@dataclass(frozen=True)
class Llama3Scaling:
    """The frequency scaling of Llama 3.1 and later."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192


@dataclass(frozen=True)
class Rows:
    """Which rows see which, spelled out.

    allowed: bool [B, N, N], row i may attend to key j. documents: int [B, N], label of each row's document.
    positions: int [B, N], position of each row for RoPE.
    """

    allowed: Tensor
    documents: Tensor
    positions: Tensor

    @property
    def valid(self) -> Tensor:
        """Rows that see at least one key, [B, N]. The others output 0 and no mean counts them."""
        return self.allowed.any(-1)

    def members(self, batch: int) -> list[list[int]]:
        """The valid rows of each document of one sequence, in order."""
        labels, valid = self.documents[batch].tolist(), self.valid[batch].tolist()
        return [
            [i for i, other in enumerate(labels) if other == label and valid[i]]
            for label in sorted({label for i, label in enumerate(labels) if valid[i]})
        ]


def rope_frequencies(head_dim: int, base: float, scaling: Llama3Scaling | None = None) -> Tensor:
    """Angle per position of each pair of features, float64 [hd / 2]."""
    frequencies = []
    for pair in range(head_dim // 2):
        frequency = base ** (-2.0 * pair / head_dim)
        if scaling is not None:
            wavelength = 2 * math.pi / frequency
            if wavelength > scaling.original_length / scaling.low_freq_factor:
                frequency = frequency / scaling.factor
            elif wavelength >= scaling.original_length / scaling.high_freq_factor:
                span = scaling.high_freq_factor - scaling.low_freq_factor
                smooth = (scaling.original_length / wavelength - scaling.low_freq_factor) / span
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        frequencies.append(frequency)
    return torch.tensor(frequencies, dtype=torch.float64)


def rope(
    x: Tensor, positions: Tensor, base: float, scaling: Llama3Scaling | None = None, *, halves: bool = False
) -> Tensor:
    """Rotate the pairs (0, 1), (2, 3), ... of the last dimension. x [B, N, heads, hd], positions [B, N].

    halves: rotate (0, hd/2), (1, hd/2 + 1), ... instead, as Hugging Face does.
    """
    if halves:
        first, second = x.chunk(2, dim=-1)
        turned = rope(torch.stack([first, second], dim=-1).flatten(-2), positions, base, scaling)
        return torch.cat([turned[..., 0::2], turned[..., 1::2]], dim=-1)
    angles = positions.to(torch.float64)[..., None] * rope_frequencies(x.shape[-1], base, scaling)  # [B, N, hd / 2]
    turn = torch.polar(torch.ones_like(angles), angles)[:, :, None, :]
    pairs = torch.view_as_complex(x.to(torch.float64).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def masked_softmax(logits: Tensor, allowed: Tensor) -> Tensor:
    """Softmax of [..., N, N] over the allowed keys of each row; rows without keys are 0."""
    logits = logits - logits.detach().masked_fill(~allowed, -torch.inf).amax(-1, keepdim=True).clamp(min=-1e300)
    weights = torch.where(allowed, logits, 0.0).exp() * allowed
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)


def row_mean_matrix(rows: Rows, integral: str) -> Tensor:
    """M [B, N, N] with A3 = M A1: row i averages the valid rows of its document, up to i (causal) or all (sequence)."""
    same = rows.documents[:, :, None] == rows.documents[:, None, :]
    counted = same & rows.valid[:, None, :] & rows.valid[:, :, None]
    if integral == "causal":
        n = rows.documents.shape[1]
        counted = counted & torch.ones(n, n, dtype=torch.bool).tril()
    elif integral != "sequence":
        raise ValueError(f"unknown integral {integral!r}")
    return counted.double() / counted.sum(-1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class Sublayer:
    """One attention sublayer's inputs, and the steps that the methods share.

    x: [B, N, D]. options: the builder's, `method` among them. layer: index of the layer, from 0. step: optimizer
    steps done. halves: the order of RoPE's pairs, see `rope`.
    """

    x: Tensor
    weights: Weights
    rows: Rows
    options: dict[str, Any]
    num_heads: int
    num_kv_heads: int
    rope_base: float = 10_000.0
    scaling: Llama3Scaling | None = None
    layer: int = 0
    step: int = 0
    halves: bool = False

    @property
    def head_dim(self) -> int:
        return self.weights["wv"].shape[0] // self.num_kv_heads

    @property
    def sign(self) -> int:
        """Of the lambda O2 term."""
        return {"subtract": -1, "add": 1}[self.options.get("combine", "subtract")]

    def kv(self, head: int) -> int:
        """The key/value head that query head `head` reads."""
        return head // (self.num_heads // self.num_kv_heads)

    def heads(self, x: Tensor, matrix: Tensor) -> Tensor:
        """x [B, N, D] times matrix^T [D, heads * hd] -> [B, N, heads, hd]."""
        return (x @ matrix.T).unflatten(-1, (-1, self.head_dim))

    def rotated(self, t: Tensor) -> Tensor:
        return rope(t, self.rows.positions, self.rope_base, self.scaling, halves=self.halves)

    def unrotated_q(self, x: Tensor) -> Tensor:
        return self.heads(x, self.weights["wq"])

    def q(self, x: Tensor) -> Tensor:
        return self.rotated(self.unrotated_q(x))

    def k(self, x: Tensor) -> Tensor:
        return self.rotated(self.heads(x, self.weights["wk"]))

    def v(self, x: Tensor) -> Tensor:
        return self.heads(x, self.weights["wv"])

    def attention_map(self, q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
        """softmax(q k^T * scale) over the allowed keys, [B, N, N]. One head: q, k [B, N, hd]."""
        return masked_softmax(q @ k.transpose(-1, -2) * (scale or self.head_dim**-0.5), self.rows.allowed)

    def primary_maps(self) -> list[Tensor]:
        """A1 of every query head."""
        q, k = self.q(self.x), self.k(self.x)
        return [self.attention_map(q[:, :, h], k[:, :, self.kv(h)]) for h in range(self.num_heads)]

    def times_v(self, maps: list[Tensor]) -> list[Tensor]:
        """Each query head's map times the values it reads, [B, N, hd] each."""
        v = self.v(self.x)
        return [m @ v[:, :, self.kv(h)] for h, m in enumerate(maps)]
