"""Planted noise (seed 002 eq. 8-10): attention logits that are an ideal plus noise of known rank.

One attention layer, RoPE off. Of each head's ``hd`` features of q and k, ``CONTENT_RANK`` carry the ideal logits and
``rank`` others the noise; a random rotation of each head hides which. So ``S = S_ideal + ξ`` holds exactly, ``ξ`` has
rank ``rank`` and standard deviation ``strength``, and the clean layer is the same one without the noise features.

Two kinds of noise:

- ``bilinear``: ``ξ = x B C x^T``, written into ``W_Q`` and ``W_K`` themselves: a change of these weights removes it.
- ``even``: ``ξ = φ(x) B C ψ(x)^T`` where φ and ψ are cosines of features of x, written into q and k beside the weights.
  An even function of x has no correlation with any linear one, so no change of ``W_Q``, ``W_K`` cancels it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrdint_tune.attention import AttentionShape, DifferentialSelfAttention, Layout, build_method
from lrdint_tune.attention.context import AttentionContext, Projections
from lrdint_tune.errors import ConfigError

EMBED_DIM, NUM_HEADS, HEAD_DIM, CONTENT_RANK = 64, 2, 32, 16
IDEAL_STD = 2.0  # of the ideal logits
KINDS = ("bilinear", "even")
ACTS_ON_FEATURES = ("dex", "diffv")  # their map is A1
_FREQUENCY = 2.0


@dataclass(frozen=True)
class Noise:
    """What is planted.

    Attributes:
        kind: ``bilinear | even``.
        rank: of ``ξ`` in each head, at most ``HEAD_DIM - CONTENT_RANK``.
        strength: standard deviation of ``ξ``; that of the ideal logits is ``IDEAL_STD``.
    """

    kind: str
    rank: int
    strength: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind={self.kind!r}: unknown; choose one of {', '.join(KINDS)}")
        if not 1 <= self.rank <= HEAD_DIM - CONTENT_RANK:
            raise ConfigError(f"rank={self.rank}: must be from 1 to {HEAD_DIM - CONTENT_RANK}")
        if not self.strength > 0:
            raise ConfigError(f"strength={self.strength}: must be above 0")


class NoisyLinear(nn.Linear):
    """``W x + U φ(x)``, ``φ_m(x) = cos(2 d_m·x)``, centred and scaled to variance 1 for normal ``x``; ``d`` and ``U``
    are no parameters."""

    directions: Tensor
    written: Tensor

    def __init__(self, weight: Tensor, directions: Tensor, written: Tensor) -> None:
        """``weight [H hd, D]``, ``directions [m, D]`` of unit length, ``written [H hd, m]``."""
        super().__init__(weight.shape[1], weight.shape[0], bias=False)
        self.weight.data.copy_(weight)
        self.register_buffer("directions", directions)
        self.register_buffer("written", written)
        w2 = _FREQUENCY**2
        self.mean = math.exp(-w2 / 2)
        self.std = math.sqrt((1 + math.exp(-2 * w2)) / 2 - math.exp(-w2))

    def forward(self, x: Tensor) -> Tensor:
        features = (torch.cos(_FREQUENCY * x @ self.directions.T) - self.mean) / self.std
        return super().forward(x) + features @ self.written.T


@dataclass(frozen=True)
class Weights:
    """Of one layer: q, k, v and output projections ``[64, 64]`` of the clean layer, and what noise adds: directions in
    x ``[H rank, D]`` and where they are written ``[H hd, H rank]``, for q and for k."""

    clean: dict[str, Tensor]
    directions: dict[str, Tensor]
    written: dict[str, Tensor]
    noise: Noise

    def projection(self, name: str, *, noisy: bool) -> nn.Linear:
        weight = self.clean[name]
        if noisy and name in self.directions:
            if self.noise.kind == "even":
                return NoisyLinear(weight, self.directions[name], self.written[name])
            weight = weight + self.written[name] @ self.directions[name]
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data.copy_(weight)
        return linear


def draw_weights(noise: Noise, generator: torch.Generator) -> Weights:
    """A layer and its noise. The clean part does not depend on ``noise``."""

    def orthogonal(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, size, generator=generator))[0]

    rotations = [orthogonal(HEAD_DIM) for _ in range(NUM_HEADS)]  # the same for q and k: products stay
    clean, directions, written = {}, {}, {}
    for name in ("q_proj", "k_proj"):
        features = orthogonal(EMBED_DIM).view(NUM_HEADS, HEAD_DIM, EMBED_DIM)
        content, rest = features[:, :CONTENT_RANK], features[:, CONTENT_RANK:]
        size = _feature_size(IDEAL_STD, CONTENT_RANK)
        clean[name] = torch.cat([r[:, :CONTENT_RANK] @ c * size for r, c in zip(rotations, content, strict=True)])
        directions[name] = rest[:, : noise.rank].flatten(0, 1)
        columns = [r[:, CONTENT_RANK:][:, : noise.rank] for r in rotations]
        written[name] = torch.block_diag(*columns) * _feature_size(noise.strength, noise.rank)
    for name in ("v_proj", "output_proj"):
        clean[name] = orthogonal(EMBED_DIM)
    return Weights(clean, directions, written, noise)


def _feature_size(std: float, rank: int) -> float:
    """Of each of ``rank`` features of q and of k, for logits ``q k / sqrt(hd)`` of standard deviation ``std``."""
    return math.sqrt(std * math.sqrt(HEAD_DIM / rank))


def build_layer(weights: Weights, *, noisy: bool, method: str = "none", **options: object) -> DifferentialSelfAttention:
    """The layer with any method on top, every parameter of the base frozen."""
    projections = {name: weights.projection(name, noisy=noisy) for name in weights.clean}
    for projection in projections.values():
        projection.requires_grad_(False)
    shape = AttentionShape(EMBED_DIM, NUM_HEADS, NUM_HEADS, HEAD_DIM)
    return DifferentialSelfAttention(
        embed_dim=EMBED_DIM,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_HEADS,
        head_dim=HEAD_DIM,
        q_proj=projections["q_proj"],
        k_proj=projections["k_proj"],
        v_proj=projections["v_proj"],
        output_proj=projections["output_proj"],
        method=build_method(method, shape, **options),
    )


@torch.no_grad()
def effective_map(layer: DifferentialSelfAttention, x: Tensor) -> Tensor:
    """``M`` with ``out = M v``, ``[B, H, N, N]`` for ``x [B, N, D]``: the method's output for one-hot values.

    ``dex`` and ``diffv`` change features, not weights: theirs is ``A1``.
    """
    ctx = _context(layer, x)
    b, n, _ = x.shape
    ctx.v = torch.eye(n, dtype=x.dtype).expand(b, layer.num_kv_heads, n, n)
    return ctx.attend(ctx.q, ctx.k, ctx.v) if layer.method.name in ACTS_ON_FEATURES else layer.method(ctx)


def _context(layer: DifferentialSelfAttention, x: Tensor) -> AttentionContext:
    return AttentionContext(
        x,
        shape=AttentionShape(layer.embed_dim, layer.num_heads, layer.num_kv_heads, layer.head_dim),
        projections=Projections(layer.q_proj, layer.k_proj, layer.v_proj, layer.pos_embeddings),
        layout=Layout(None, None, num_queries=x.shape[1], batch_size=x.shape[0]),
        cache=None,
        backend=layer.backend,
    )


@torch.no_grad()
def errors(
    layer: DifferentialSelfAttention, clean: DifferentialSelfAttention, noisy: DifferentialSelfAttention, x: Tensor
) -> dict[str, float]:
    """What is left of the noise: ``||O - O_ideal|| / ||O_noisy - O_ideal||`` and the same of the maps. 1 is the
    untouched layer, 0 the clean one."""
    ideal, before = clean(x), noisy(x)
    ideal_map, map_before = effective_map(clean, x), effective_map(noisy, x)
    return {
        "output": float((layer(x) - ideal).norm() / (before - ideal).norm()),
        "map": float((effective_map(layer, x) - ideal_map).norm() / (map_before - ideal_map).norm()),
    }


@torch.no_grad()
def oracles(clean: DifferentialSelfAttention, noisy: DifferentialSelfAttention, x: Tensor) -> dict[str, float]:
    """Map errors of second maps that no training has to find, each with the best λ of its head.

    ``A2 = softmax(ξ)`` is seed 002's hypothesis (its eq. 10), ``A2 = softmax(S_ideal)`` the answer itself, ``A2 = A1``
    no more than a smaller output. ``A3`` is the prefix mean of ``A1``, DINT's.
    """
    n = x.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    ideal, before = effective_map(clean, x), effective_map(noisy, x)
    xi = _logits(noisy, x) - _logits(clean, x)
    noise = xi.masked_fill(~causal, -math.inf).softmax(-1)
    integral = before.cumsum(-2) / torch.arange(1, n + 1)[:, None]
    subtracted = {
        "A1 - λ A1": before,
        "A1 - λ softmax(ξ)": noise,
        "A1 - λ softmax(S_ideal)": ideal,
        "A1 - λ (softmax(ξ) - A3)": noise - integral,
        "A1 - λ (softmax(S_ideal) - A3)": ideal - integral,
    }
    wrong, left = before - ideal, {}
    for name, term in subtracted.items():
        lam = (wrong * term).sum((0, 2, 3), True) / (term**2).sum((0, 2, 3), True)
        left[name] = float((wrong - lam * term).norm() / wrong.norm())
    return left


@torch.no_grad()
def second_map_resembles(
    layer: DifferentialSelfAttention, clean: DifferentialSelfAttention, noisy: DifferentialSelfAttention, x: Tensor
) -> dict[str, float] | None:
    """Correlation of the second map's logits with ``ξ`` (``noise``) and with the ideal ones (``ideal``), each row's
    mean taken off; None for a method without a second softmax map. Seed 002 expects them to learn ``ξ``."""
    calls: list[tuple[Tensor, Tensor, float | None]] = []
    ctx = _context(layer, x)
    attend = ctx.attend

    def recorded(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
        calls.append((q, k, scale))
        return attend(q, k, v, scale, bias)

    ctx.attend = recorded  # type: ignore[method-assign]
    layer.method(ctx)
    if len(calls) < 2:
        return None
    q2, k2, _ = calls[1]  # a scale changes no correlation
    ideal = _logits(clean, x)
    second, xi, ideal = (_centred(t) for t in (q2 @ k2.transpose(-1, -2), _logits(noisy, x) - ideal, ideal))
    return {
        name: float((second * other).sum() / (second.norm() * other.norm()))
        for name, other in (("noise", xi), ("ideal", ideal))
    }


def _centred(logits: Tensor) -> Tensor:
    """Without the mean over a row's allowed keys, and 0 at the others."""
    allowed = torch.ones_like(logits[0, 0]).tril()
    return (logits - (logits * allowed).sum(-1, True) / allowed.sum(-1, True)) * allowed


def _logits(layer: DifferentialSelfAttention, x: Tensor) -> Tensor:
    """``q k^T / sqrt(hd)``, ``[B, H, N, N]``."""
    q, k = (p(x).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj))
    return q @ k.transpose(-1, -2) / math.sqrt(layer.head_dim)
