"""Differential attention written straight from its formulas, with every N x N map in memory.

This is what the fast code is compared with, so it shares nothing with it: raw weight tensors in, loops over heads,
maps as explicit matrices, documents as explicit integer labels. Use float64.

Symbols: B batch, N rows, D embed dim, H query heads, K key/value heads, hd head dim, r rank.

    q1 = rope(x Wq)   k1 = rope(x Wk)   v = x Wv
    q2 = rope(x Wdown_q Wup_q)          k2 = rope(x Wdown_k Wup_k)            (or x Wq2, x Wk2 at full rank)
    A1 = softmax(q1 k1^T / sqrt(hd))    A2 = softmax(q2 k2^T * secondary scale)
    none  A1 v        diff  (A1 - lam A2) v        dint  (A1 - lam A2 + lam A3) v
    A3 causal:    A3[i, j] = mean of A1[m, j] over the rows m <= i of i's document
    A3 sequence:  A3[i, j] = mean of A1[m, j] over all rows m of i's document
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]
"""wq [H*hd, D], wk, wv [K*hd, D], wo [D, H*hd]; q2.down [H*r, D] or [r, D], q2.up [H, r, hd] or q2.weight [H*hd, D];
k2.* likewise with K heads; lam: the effective lambda, [H] or [1] (see `reference_lambda`)."""


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


def rope(x: Tensor, positions: Tensor, base: float, scaling: Llama3Scaling | None = None) -> Tensor:
    """Rotate the pairs (0, 1), (2, 3), ... of the last dimension. x [B, N, heads, hd], positions [B, N]."""
    angles = positions.to(torch.float64)[..., None] * rope_frequencies(x.shape[-1], base, scaling)  # [B, N, hd / 2]
    turn = torch.polar(torch.ones_like(angles), angles)[:, :, None, :]
    pairs = torch.view_as_complex(x.to(torch.float64).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def attention_map(q: Tensor, k: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) over the allowed keys, [B, N, N]; rows without keys are 0. One head: q, k [B, N, hd]."""
    logits = (q @ k.transpose(-1, -2)) * scale
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


def reference_lambda(form: str, p: Tensor, *, lam_init: float = 0.8, step: float = 0, anneal_steps: int = 1) -> Tensor:
    """learned: p. fixed: lam_init. annealed: (1 - a) (t/T) lam_init + a p with a = min(1, t/T)."""
    if form == "learned":
        return p
    if form == "fixed":
        return torch.full_like(p, lam_init)
    if form == "annealed":
        a = min(1.0, step / anneal_steps)
        return (1 - a) * (step / anneal_steps) * lam_init + a * p
    raise ValueError(f"unknown lambda form {form!r}")


def secondary_multiplier(secondary_scale: str | float, head_dim: int) -> float:
    """1 / sqrt(d2) with d2 = hd/81 (seed), hd/9 (variance), hd (standard); a number is the multiplier itself."""
    divisors = {"seed": 81.0, "variance": 9.0, "standard": 1.0}
    if isinstance(secondary_scale, str):
        return 1.0 / math.sqrt(head_dim / divisors[secondary_scale])
    return float(secondary_scale)


def secondary_heads(x: Tensor, weights: Weights, name: str, num_heads: int) -> Tensor:
    """x Wdown Wup per head, or x W2 at full rank: [B, N, heads, hd]. `name` is q2 or k2."""
    if f"{name}.weight" in weights:
        return (x @ weights[f"{name}.weight"].T).unflatten(-1, (num_heads, -1))
    down, up = weights[f"{name}.down"], weights[f"{name}.up"]
    rank = up.shape[1]
    heads = []
    for head in range(num_heads):
        shared = down.shape[0] == rank and num_heads > 1
        factor = down if shared else down[head * rank : (head + 1) * rank]
        heads.append(x @ factor.T @ up[head])
    return torch.stack(heads, dim=2)


def combined_map(
    x: Tensor,
    weights: Weights,
    rows: Rows,
    *,
    method: str,
    num_heads: int,
    num_kv_heads: int,
    rope_base: float = 10_000.0,
    scaling: Llama3Scaling | None = None,
    secondary_scale: str | float = "seed",
    integral: str = "causal",
) -> Tensor:
    """The matrix that multiplies v, per query head: [B, H, N, N]."""
    q1 = rope((x @ weights["wq"].T).unflatten(-1, (num_heads, -1)), rows.positions, rope_base, scaling)
    k1 = rope((x @ weights["wk"].T).unflatten(-1, (num_kv_heads, -1)), rows.positions, rope_base, scaling)
    head_dim = q1.shape[-1]
    group = num_heads // num_kv_heads
    a1 = [attention_map(q1[:, :, h], k1[:, :, h // group], rows.allowed, head_dim**-0.5) for h in range(num_heads)]
    if method == "none":
        return torch.stack(a1, dim=1)

    q2 = rope(secondary_heads(x, weights, "q2", num_heads), rows.positions, rope_base, scaling)
    k2 = rope(secondary_heads(x, weights, "k2", num_kv_heads), rows.positions, rope_base, scaling)
    scale2 = secondary_multiplier(secondary_scale, head_dim)
    lam = weights["lam"].expand(num_heads)
    maps = []
    for h in range(num_heads):
        a2 = attention_map(q2[:, :, h], k2[:, :, h // group], rows.allowed, scale2)
        combined = a1[h] - lam[h] * a2
        if method == "dint":
            combined = combined + lam[h] * (row_mean_matrix(rows, integral).to(x.dtype) @ a1[h])
        elif method != "diff":
            raise ValueError(f"unknown method {method!r}")
        maps.append(combined)
    return torch.stack(maps, dim=1)


def reference_attention(
    x: Tensor,
    weights: Weights,
    rows: Rows,
    *,
    method: str,
    num_heads: int,
    num_kv_heads: int,
    rope_base: float = 10_000.0,
    scaling: Llama3Scaling | None = None,
    secondary_scale: str | float = "seed",
    integral: str = "causal",
) -> Tensor:
    """The whole attention module, from x [B, N, D] to the output projection's result [B, N, D]."""
    maps = combined_map(
        x,
        weights,
        rows,
        method=method,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        rope_base=rope_base,
        scaling=scaling,
        secondary_scale=secondary_scale,
        integral=integral,
    )
    v = (x @ weights["wv"].T).unflatten(-1, (num_kv_heads, -1))  # [B, N, K, hd]
    group = num_heads // num_kv_heads
    out = torch.cat([maps[:, h] @ v[:, :, h // group] for h in range(num_heads)], dim=-1)  # [B, N, H * hd]
    return out @ weights["wo"].T
