"""LMAM: a learned map beside the attention map, on n positions of each document.

    map = (a + PE) b scale            PE_pos = 1 / 10000^(2 pos / n), added along the n axis; or w scale at full rank
                                      b is the seed's W_b + PE
    default         (A1 + tril(map)) v
    inside_softmax  softmax(q k^T / sqrt(hd) + map) v      the map is 0 outside its n positions
    softmax_map     (A1 + softmax(map, -inf above the diagonal)) v

The n positions are a document's first rows (`alignment: start`) or its last (`end`); a shorter document takes the
map's upper left corner.
"""

import torch
from torch import Tensor

from tests.common.reference.parts import Sublayer, masked_softmax


def learned_map(s: Sublayer, head: int) -> Tensor:
    """[n, n], of query head `head`: the maps of the H_s heads are repeated in turn."""
    scale = s.options.get("scale", 1 / 255)
    n = s.options.get("n", 128)
    if s.options.get("full_rank"):
        w = s.weights["w"]
        assert w.shape == (s.options.get("heads") or s.num_heads, n, n)
        return w[head % w.shape[0]] * scale
    a, b = s.weights["a"], s.weights["b"]
    rank, count = s.options.get("rank", 2), s.options.get("heads") or s.num_heads
    assert a.shape == (count, n, rank) and b.shape == (count, rank, n)
    a, b = a[head % count], b[head % count]
    if s.options.get("position", "pe") == "pe":
        encoding = torch.tensor([1 / 10_000 ** (2 * pos / n) for pos in range(n)], dtype=a.dtype)
        a = a + encoding[:, None]
    return a @ b * scale


def placed(s: Sublayer, head: int) -> Tensor:
    """The map of one head where it belongs among the rows and keys, [B, N, N]; 0 elsewhere.

    Its part above the diagonal stays only for `inside_softmax`, where the mask of the attention hides it.
    """
    learned, total = learned_map(s, head), s.x.shape[1]
    out = []
    for batch in range(s.x.shape[0]):
        whole = torch.zeros(total, total, dtype=s.x.dtype)
        for document in s.rows.members(batch):
            m = min(len(learned), len(document))
            rows = document[-m:] if s.options.get("alignment") == "end" else document[:m]
            at = torch.zeros(total, m, dtype=s.x.dtype)  # the place of each of the map's rows
            at[rows, range(m)] = 1
            corner = learned[:m, :m]
            if s.options.get("softmax_map"):
                corner = masked_softmax(corner, torch.ones(m, m, dtype=torch.bool).tril())
            elif not s.options.get("inside_softmax"):
                corner = corner.tril()
            whole = whole + at @ corner @ at.T
        out.append(whole)
    return torch.stack(out)


def lmam(s: Sublayer) -> list[Tensor]:
    if not s.options.get("inside_softmax"):
        return s.times_v([a1 + placed(s, h) for h, a1 in enumerate(s.primary_maps())])
    q, k = s.q(s.x), s.k(s.x)
    maps = []
    for h in range(s.num_heads):
        logits = q[:, :, h] @ k[:, :, s.kv(h)].transpose(-1, -2) * s.head_dim**-0.5
        maps.append(masked_softmax(logits + placed(s, h), s.rows.allowed))
    return s.times_v(maps)
