"""The methods with a lambda, and the control. Each returns one output [B, N, hd] per query head.

Written for `combine: subtract`; with `add` the sign of the lambda O2 term alone is the other one.

    none      A1 v
    diff      (A1 - lam A2) v                      q2 = rope(x Wdown Wup), k2 likewise, or x W2 at full rank
    dint      (A1 - lam A2 + lam A3) v             A3[i, j] = mean of A1[m, j] over the rows m <= i of i's document
    daa       (A1 - lam A2) v                      q2 = rope(q W_DAA), or rope(q) W_DAA
    diffq     (A1 - lam A2) v                      q2 = rope((x W_D) W_Q)
    diffk     (A1 - lam A2) v                      k2 = rope((x W_D) W_K)
    diffv     A1 (x W_V - lam (x W_D) W_V)
    dex       A1 v (I - lam W_DEX)
    difflora  (A1 - lam A2) v                      q1 = rope(x W_Q + (alpha/r) x A B), q2 = rope((alpha/r) x A B)
"""

import math

import torch
from torch import Tensor

from tests.common.reference.lam import lambda_init, reference_lambda
from tests.common.reference.parts import Sublayer, row_mean_matrix


def lambdas(s: Sublayer, heads: int) -> list[Tensor]:
    """Per head [B, N, 1]."""
    lam = reference_lambda(s.x, s.weights, s.options, heads, layer=s.layer, step=s.step)
    return [lam[:, h, :, None] for h in range(heads)]


def low_rank(s: Sublayer, name: str, heads: int, shared: bool) -> Tensor:
    """x Wdown Wup for every head, [B, N, heads, hd]; one Wdown for all heads where they are shared."""
    down, up = s.weights[f"{name}.down.weight"], s.weights[f"{name}.up"]
    rank = up.shape[1]
    out = []
    for head in range(heads):
        factor = down if shared else down[head * rank : (head + 1) * rank]
        assert factor.shape[0] == rank
        out.append(s.x @ factor.T @ up[head])
    return torch.stack(out, dim=2)


def secondary(s: Sublayer, name: str, heads: int) -> Tensor:
    """q2 or k2 of diff and dint before the rotation."""
    if s.options.get("rank", 8) is None:
        return s.heads(s.x, s.weights[f"{name}.weight"])
    return low_rank(s, name, heads, s.options.get("factors") == "shared")


def secondary_multiplier(secondary_scale: str | float, head_dim: int) -> float:
    """1 / sqrt(d2) with d2 = hd/81 (seed), hd/9 (variance), hd (standard); a number is the multiplier itself."""
    divisors = {"seed": 81.0, "variance": 9.0, "standard": 1.0}
    if isinstance(secondary_scale, str):
        return 1.0 / math.sqrt(head_dim / divisors[secondary_scale])
    return float(secondary_scale)


def noise_maps(s: Sublayer, q2: Tensor, k2: Tensor, scale: float | None = None) -> list[Tensor]:
    """A2 for every query head. q2 has H heads, or K: then one serves the query heads of its group."""
    per_group = s.options.get("noise_heads") == "kv"
    assert q2.shape[2] == (s.num_kv_heads if per_group else s.num_heads)
    return [
        s.attention_map(q2[:, :, s.kv(h) if per_group else h], k2[:, :, s.kv(h)], scale) for h in range(s.num_heads)
    ]


def noise_query_heads(s: Sublayer) -> int:
    return s.num_kv_heads if s.options.get("noise_heads") == "kv" else s.num_heads


def subtract(s: Sublayer, signal: list[Tensor], noise: list[Tensor]) -> list[Tensor]:
    """Per head signal - lam noise; both maps [B, N, N], or both outputs [B, N, hd]."""
    return [o1 + s.sign * lam * o2 for o1, lam, o2 in zip(signal, lambdas(s, s.num_heads), noise, strict=True)]


def sublayer_norm(s: Sublayer, outputs: list[Tensor]) -> list[Tensor]:
    """Each head's RMSNorm over hd, times (1 - lam_init), where the option asks for it."""
    if not s.options.get("sublayer_norm"):
        return outputs
    factor = 1 - lambda_init(s.options, s.layer)
    return [o / torch.sqrt((o**2).mean(-1, keepdim=True) + 1e-5) * s.weights["norm.weight"] * factor for o in outputs]


def none(s: Sublayer) -> list[Tensor]:
    return s.times_v(s.primary_maps())


def diff_maps(s: Sublayer, a1: list[Tensor]) -> list[Tensor]:
    q2 = s.rotated(secondary(s, "q2", noise_query_heads(s)))
    shared_keys = s.options.get("secondary_keys") == "shared"
    k2 = s.k(s.x) if shared_keys else s.rotated(secondary(s, "k2", s.num_kv_heads))
    scale = secondary_multiplier(s.options.get("secondary_scale", "seed"), s.head_dim)
    return subtract(s, a1, noise_maps(s, q2, k2, scale))


def diff(s: Sublayer) -> list[Tensor]:
    return sublayer_norm(s, s.times_v(diff_maps(s, s.primary_maps())))


def dint(s: Sublayer) -> list[Tensor]:
    a1 = s.primary_maps()
    mean = row_mean_matrix(s.rows, s.options.get("integral", "causal")).to(s.x.dtype)
    maps = [m + lam * (mean @ a) for m, lam, a in zip(diff_maps(s, a1), lambdas(s, s.num_heads), a1, strict=True)]
    return sublayer_norm(s, s.times_v(maps))


def per_head(t: Tensor, matrices: Tensor) -> Tensor:
    """t [B, N, H, hd] times each head's matrix [hd, hd] (one for all heads if there is only one)."""
    count = matrices.shape[0]
    return torch.stack([t[:, :, h] @ matrices[h if count > 1 else 0] for h in range(t.shape[2])], dim=2)


def daa(s: Sublayer) -> list[Tensor]:
    w = s.weights["w_daa"]
    if s.options.get("position", "before") == "before":
        q2 = s.rotated(per_head(s.unrotated_q(s.x), w))
    else:
        q2 = per_head(s.q(s.x), w)
    return s.times_v(subtract(s, s.primary_maps(), noise_maps(s, q2, s.k(s.x))))


def diffq(s: Sublayer) -> list[Tensor]:
    noise = noise_maps(s, s.q(s.x @ s.weights["w_d"]), s.k(s.x))
    return s.times_v(subtract(s, s.primary_maps(), noise))


def diffk(s: Sublayer) -> list[Tensor]:
    noise = noise_maps(s, s.q(s.x), s.k(s.x @ s.weights["w_d"]))
    return s.times_v(subtract(s, s.primary_maps(), noise))


def diffv(s: Sublayer) -> list[Tensor]:
    """One map; lambda belongs to the key/value head, and a lambda per token to the token whose value it is."""
    v, v2 = s.v(s.x), s.v(s.x @ s.weights["w_d"])
    lam = lambdas(s, s.num_kv_heads)
    values = [v[:, :, g] + s.sign * lam[g] * v2[:, :, g] for g in range(s.num_kv_heads)]
    return [a1 @ values[s.kv(h)] for h, a1 in enumerate(s.primary_maps())]


def dex(s: Sublayer) -> list[Tensor]:
    """The layer's one matrix, or each head's own, on all heads or on the selected ones."""
    w = s.weights["w_dex"]
    assert w.shape[0] == (1 if s.options.get("sharing") == "layer" else s.num_heads)
    o1 = none(s)
    o2 = per_head(torch.stack(o1, dim=2), w).unbind(2)
    selected = s.weights["selected"].tolist() if s.options.get("heads") == "top_entropy" else [1.0] * s.num_heads
    out = subtract(s, o1, list(o2))
    return [out[h] if selected[h] else o1[h] for h in range(s.num_heads)]


def difflora(s: Sublayer) -> list[Tensor]:
    def adapter(name: str, heads: int) -> Tensor:
        rank = s.options.get("rank", 8)
        assert s.weights[f"{name}.down.weight"].shape[0] == rank
        return s.options.get("lora_alpha", 16) / rank * low_rank(s, name, heads, shared=True)

    q1, k1 = s.unrotated_q(s.x), s.heads(s.x, s.weights["wk"])
    if s.options.get("positive_lora", True):
        q1, k1 = q1 + adapter("q1", s.num_heads), k1 + adapter("k1", s.num_kv_heads)
    q1, k1 = s.rotated(q1), s.rotated(k1)
    q2 = s.rotated(adapter("q2", noise_query_heads(s)))
    shared_keys = s.options.get("secondary_keys") == "shared"
    k2 = k1 if shared_keys else s.rotated(adapter("k2", s.num_kv_heads))
    a1 = [s.attention_map(q1[:, :, h], k1[:, :, s.kv(h)]) for h in range(s.num_heads)]
    return sublayer_norm(s, s.times_v(subtract(s, a1, noise_maps(s, q2, k2))))
