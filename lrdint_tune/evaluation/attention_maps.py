"""What a model attends to on one text, in numbers per layer and head; no ``N x N`` map is kept.

Of every layer two maps are described: the effective one ``M`` (``out = M v``: ``A1 - λ A2 + λ A3`` of ``dint``, and so
on; ``A1`` for ``dex`` and ``diffv``, which act on features and values) and the first, ``A1``. Each number is the mean
over the rows of the text. ``w`` are a row's weights, and where a weight may be negative a share is one of ``sum |w|``:

- ``entropy``: ``-sum p ln p`` in nats with ``p = |w| / sum |w|``; 0 for a row whose weights are all 0;
- ``first_token_mass``: ``|w|`` on the document's first token, as a share;
- ``negative_share``: how many of the allowed weights are below 0 ("Neg Rat" of seed 004);
- ``noise_to_signal``: ``|w|`` outside the ``top_k`` largest over that inside;
- ``future_mass``: ``|w|`` on keys that the mask hides, as a share: 0 except for the literal integral.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrdint_tune.attention import DifferentialSelfAttention
from lrdint_tune.attention.lambdas import LambdaForm
from lrdint_tune.attention.layout import Layout, MaskType
from lrdint_tune.attention.probe import MapRows, map_rows
from lrdint_tune.models.decoder import LlamaDecoder

STATISTICS = ("entropy", "first_token_mass", "negative_share", "noise_to_signal", "future_mass")
CELLS = 64  # a heat map's largest side
Heads = Mapping[int, Sequence[int]]


@dataclass
class LayerStatistics:
    """What was found in one layer.

    Attributes:
        effective, first: name of the statistic -> float32 ``[H]``, of ``M`` and of ``A1``.
        heat_maps: head -> float32 ``[cells, cells]``, the mean weight of ``M`` in each cell, signed.
        lam: None, or the mean λ of each head over the tokens, float32 ``[count]`` (one for all heads, one per head, or
            for ``diffv`` per key/value head), and its smallest and largest value, float32 ``[2]``.
        o2_o1_ratio: None, or ``||O2|| / ||O1||``.
    """

    effective: dict[str, Tensor]
    first: dict[str, Tensor]
    heat_maps: dict[int, Tensor]
    lam: tuple[Tensor, Tensor] | None
    o2_o1_ratio: float | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        lam = None
        if self.lam is not None:
            per_head, limits = self.lam
            lam = {
                "mean": per_head.mean().item(),
                "min": limits[0].item(),
                "max": limits[1].item(),
                "per_head": per_head.tolist(),
            }
        return {
            "effective": {name: values.tolist() for name, values in self.effective.items()},
            "first_map": {name: values.tolist() for name, values in self.first.items()},
            "lambda": lam,
            "o2_o1_ratio": self.o2_o1_ratio,
        }


def attention_statistics(
    model: LlamaDecoder, tokens: Tensor, top_k: int = 8, *, mask: MaskType = None, heat_maps: Heads | None = None
) -> dict[str, Any]:
    """The statistics of every layer as a JSON-able mapping: ``num_tokens``, ``top_k``, ``method`` and ``layers``, whose
    entries are :meth:`LayerStatistics.as_dict`.

    Arguments and errors as :func:`probe_layers`.
    """
    layers = probe_layers(model, tokens, top_k, mask=mask, heat_maps=heat_maps)
    return {
        "method": model.spec.method,
        "num_tokens": tokens.shape[1],
        "top_k": top_k,
        "layers": [layer.as_dict() for layer in layers],
    }


@torch.no_grad()
def probe_layers(
    model: LlamaDecoder, tokens: Tensor, top_k: int = 8, *, mask: MaskType = None, heat_maps: Heads | None = None
) -> list[LayerStatistics]:
    """One forward of ``tokens``, and in every layer a second look at its map, 64 rows at a time.

    The model is evaluated without dropout, and its diagnostics are off afterwards. Under FSDP2 all ranks must call it
    with the same tokens.

    Args:
        model: on the device of ``tokens``; not split by tensor or context parallelism.
        tokens: int64 ``[1, N]`` (or ``[B, N]``: means are over all rows, heat maps are of the first sequence).
        top_k: how many weights of a row count as signal.
        mask: as the model's, no ``BlockMask``.
        heat_maps: layer -> heads whose heat maps are wanted.

    Raises:
        ValueError: ``top_k`` is no positive number, or the model is split.
    """
    if top_k < 1:
        raise ValueError(f"top_k={top_k}: must be at least 1")
    if model.sequence_shard is not None or model.tensor_shard is not None:
        raise ValueError("the attention maps of a model that is split by context or tensor parallelism are not there")
    found: dict[int, LayerStatistics] = {}
    with _watched(model, found, top_k, heat_maps or {}):
        # Only the blocks matter: one label keeps the head from computing all logits.
        labels = torch.full_like(tokens, -100)
        labels[:, 0] = 0
        model(tokens, mask=mask, labels=labels, per_token=True)
    return [found[i] for i in sorted(found)]


@contextmanager
def _watched(model: LlamaDecoder, found: dict[int, LayerStatistics], top_k: int, heat_maps: Heads) -> Iterator[None]:
    def watch(i: int) -> Any:
        def hook(attention: DifferentialSelfAttention, args: Any, kwargs: Any, output: Tensor) -> None:
            found[i] = layer_statistics(attention, args[0], kwargs["mask"], top_k, heat_maps.get(i, ()))

        return model.attention(i).register_forward_hook(hook, with_kwargs=True)

    training = model.training
    model.eval()
    model.enable_diagnostics()
    handles = [watch(i) for i in range(len(model.layers))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.enable_diagnostics(False)
        model.train(training)


def layer_statistics(
    attention: DifferentialSelfAttention, x: Tensor, layout: Layout, top_k: int, heads: Sequence[int]
) -> LayerStatistics:
    """Of one layer whose forward, with diagnostics, has just been; they are off afterwards.

    Args:
        attention: the layer.
        x: ``[B, N, D]``, its input.
        layout: the mask of the whole sequences.
        top_k: as for :func:`probe_layers`.
        heads: whose heat maps are wanted.
    """
    ratio = attention.method.diagnostics().get("o2_o1_ratio")
    effective, first = _Sums(top_k), _Sums(top_k)
    pooled = _HeatMaps(heads, x.shape[1], x.device) if heads else None
    for block in map_rows(attention, x, layout):
        effective.add(block, block.effective)
        first.add(block, block.first)
        if pooled is not None:
            pooled.add(block)
    form = next((m for m in attention.method.children() if isinstance(m, LambdaForm)), None)
    return LayerStatistics(
        effective.means(),
        first.means(),
        {} if pooled is None else pooled.means(),
        None if form is None else _lambda(form.lam(x)),
        None if ratio is None else ratio.item(),
    )


def _lambda(lam: Tensor) -> tuple[Tensor, Tensor]:
    per_head = lam.mean((0, 2, 3)) if lam.dim() == 4 else lam.flatten()
    # Copies: λ may be a view of a parameter, whose memory FSDP2 takes back when the block is done.
    return per_head.to("cpu", torch.float32, copy=True), torch.stack([lam.min(), lam.max()]).float().cpu()


class _Sums:
    """Statistics added up over rows."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self.total: Tensor | float = 0.0  # [statistics, H]
        self.rows: Tensor | float = 0.0

    def add(self, block: MapRows, weights: Tensor) -> None:
        size = weights.abs()
        total = size.sum(-1)  # [B, H, R]
        safe = total.clamp(min=torch.finfo(total.dtype).tiny)
        # -sum p ln p with p = w / t is ln t - (sum w ln w) / t: one pass over the rows less.
        entropy = torch.where(total > 0, torch.special.entr(size).sum(-1) / safe + safe.log(), 0)
        first_key = block.first_key[:, None, :, None].expand(*total.shape, 1)
        allowed = block.allowed[:, None]
        inside = size.topk(min(self.top_k, size.shape[-1]), dim=-1).values.sum(-1)
        seen = (size * allowed).sum(-1)
        values = torch.stack(
            [
                entropy,
                size.gather(-1, first_key).squeeze(-1) / safe,
                ((weights < 0) & allowed).sum(-1) / allowed.sum(-1).clamp(min=1),
                (total - inside).clamp(min=0) / inside.clamp(min=torch.finfo(total.dtype).tiny),
                (total - seen).clamp(min=0) / safe,
            ]
        )
        counted = block.counted.expand(len(total), -1)
        self.total = self.total + (values * counted[:, None]).sum((1, 3))
        self.rows = self.rows + counted.sum()

    def means(self) -> dict[str, Tensor]:
        assert isinstance(self.total, Tensor)
        return dict(zip(STATISTICS, (self.total / self.rows).float().cpu().unbind(), strict=True))


class _HeatMaps:
    """The maps of some heads, cells of rows and keys averaged."""

    def __init__(self, heads: Sequence[int], n: int, device: torch.device) -> None:
        self.heads = list(heads)
        cells = min(CELLS, n)
        cell = torch.arange(n, device=device) * cells // n
        self.pool = torch.nn.functional.one_hot(cell, cells).float()
        self.pool /= self.pool.sum(0)  # [N, cells], a mean over each cell's tokens
        self.total = torch.zeros(len(self.heads), cells, cells, device=device)

    def add(self, block: MapRows) -> None:
        weights = block.effective[0, self.heads].float()  # [heads, R, N]
        rows = self.pool[block.begin : block.begin + weights.shape[1]]
        self.total += rows.T @ (weights @ self.pool)

    def means(self) -> dict[int, Tensor]:
        return dict(zip(self.heads, self.total.cpu().unbind(), strict=True))
