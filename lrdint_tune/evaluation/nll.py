"""Held-out losses, document by document: teacher-forced, and predicted from prefixes alone.

The second is what generation sees. Of a causal model both are the same; where later tokens reach earlier positions
(``dint`` with ``integral: sequence``) the ordinary, teacher-forced loss is fooled, and their difference is the leak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.statistics import Estimate, ratio_estimate
from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.models.loss import IGNORE_INDEX

MAX_TOKENS = 4096  # of a forward, padding included
PER_DOCUMENT = 16  # positions that are predicted from their prefix; those of a document are not independent
Rows = Sequence[tuple[Tensor, Tensor]]
Between = Callable[[], None]


class DocumentLoss(NamedTuple):
    """Of each document the sum of its token losses in nats and the number of its trained tokens, float64 ``[rows]``."""

    sums: np.ndarray
    counts: np.ndarray

    def estimate(self) -> Estimate:
        """NLL per token, with the standard error over documents."""
        return ratio_estimate(self.sums, self.counts)


@dataclass(frozen=True)
class Leak:
    """NLL per token at the same positions, in nats; standard errors over documents.

    Attributes:
        teacher_forced: with the whole document in front of the model, as training and ordinary validation see it.
        prefix_wise: each position from its prefix alone.
        gap: prefix-wise minus teacher-forced.
        positions: how many tokens were predicted.
        inside_sums, alone_sums: of each document with such a token, in order, the sum of its losses in nats,
            teacher-forced and prefix-wise, float64 ``[documents]``.
        counts: how many tokens that is of each, float64 ``[documents]``.
    """

    teacher_forced: Estimate
    prefix_wise: Estimate
    gap: Estimate
    positions: int
    inside_sums: np.ndarray
    alone_sums: np.ndarray
    counts: np.ndarray

    def as_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).as_dict() for name in ("teacher_forced", "prefix_wise", "gap")}
        return {**parts, "positions": self.positions}


def document_nll(
    model: LlamaDecoder,
    rows: Rows,
    *,
    device: torch.device,
    max_tokens: int = MAX_TOKENS,
    between: Between = lambda: None,
) -> DocumentLoss:
    """The loss of each document, by itself, teacher-forced.

    In a process group of several ranks all of them must call it with the same rows; each computes its share.

    Args:
        model: evaluated without dropout; its mode is restored.
        rows: ``(tokens, labels)`` of each document, int64 ``[n]``, without padding; labels are shifted
            (``labels[i]`` is what position ``i`` must predict), -100 is not counted.
        device: of the model.
        max_tokens: of a forward.
        between: called before every forward, on all ranks.

    Raises:
        ConfigError: there are no rows.
        ValueError: the model shares its sequences or layers with other processes.
    """
    if not rows:
        raise ConfigError("no documents to evaluate; check the data")
    sums = torch.zeros(len(rows), dtype=torch.float64)
    for indices, losses in _losses(model, rows, device, max_tokens, between):
        sums[indices] += losses.double().sum(1).cpu()
    counts = torch.tensor([int((labels != IGNORE_INDEX).sum()) for _, labels in rows], dtype=torch.float64)
    return DocumentLoss(_over_ranks(sums, device).numpy(), counts.numpy())


def measure_leak(
    model: LlamaDecoder,
    rows: Rows,
    *,
    positions: int,
    device: torch.device,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    between: Between = lambda: None,
) -> Leak:
    """Predict some labelled positions twice: inside their document, and from their prefix alone.

    Args:
        positions: how many, at most ``PER_DOCUMENT`` of a document; fewer if there are no more.
        seed: of the draw of documents and positions.

    The other arguments, and what is raised, are :func:`document_nll`'s.
    """
    chosen = draw_positions(rows, positions, seed)
    if not chosen:
        raise ConfigError("no trained token to evaluate; check the data")
    numbers = sorted({row for row, _ in chosen})
    whole = torch.zeros(len(chosen), dtype=torch.float64)
    places: dict[int, list[tuple[int, int]]] = {row: [] for row in numbers}
    for at, (row, position) in enumerate(chosen):
        places[row].append((at, position))
    only_chosen = [(rows[row][0], _labels_at(rows[row][1], [p for _, p in places[row]])) for row in numbers]
    for indices, losses in _losses(model, only_chosen, device, max_tokens, between):
        for index, loss in zip(indices, losses.double().cpu(), strict=True):
            for at, position in places[numbers[index]]:
                whole[at] += loss[position]
    prefixes = [
        (rows[row][0][: position + 1], _labels_at(rows[row][1][: position + 1], [position])) for row, position in chosen
    ]
    alone = torch.zeros(len(chosen), dtype=torch.float64)
    for indices, losses in _losses(model, prefixes, device, max_tokens, between):
        alone[indices] += losses.double().sum(1).cpu()
    whole, alone = _over_ranks(whole, device), _over_ranks(alone, device)

    owner = torch.tensor([numbers.index(row) for row, _ in chosen])

    def by_document(losses: Tensor) -> np.ndarray:
        return torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, owner, losses).numpy()

    n, inside_sums, alone_sums = by_document(torch.ones_like(whole)), by_document(whole), by_document(alone)
    inside, prefixes_alone, gap = (ratio_estimate(s, n) for s in (inside_sums, alone_sums, alone_sums - inside_sums))
    return Leak(inside, prefixes_alone, gap, len(chosen), inside_sums, alone_sums, n)


def draw_positions(rows: Rows, positions: int, seed: int) -> list[tuple[int, int]]:
    """``(row, position)`` of labelled positions, in order, the same for every model: one of each document, then another
    one, so that as many documents as can be have a say."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    shuffled: dict[int, list[int]] = {}
    drawn: list[tuple[int, int]] = []
    for turn in range(PER_DOCUMENT):
        for row in order:
            if len(drawn) >= positions:  # the other documents are not even read
                return sorted(drawn)
            if row not in shuffled:
                labelled = (rows[row][1] != IGNORE_INDEX).nonzero().squeeze(1)
                shuffled[row] = labelled[torch.randperm(len(labelled), generator=generator)].tolist()
            drawn += [(row, position) for position in shuffled[row][turn : turn + 1]]
    return sorted(drawn)


def _labels_at(labels: Tensor, positions: list[int]) -> Tensor:
    kept = torch.full_like(labels, IGNORE_INDEX)
    kept[positions] = labels[positions]
    return kept


@torch.no_grad()
def _losses(
    model: LlamaDecoder, rows: Rows, device: torch.device, max_tokens: int, between: Between
) -> Iterator[tuple[list[int], Tensor]]:
    """``(row numbers, token losses [B, N])`` of this rank's batches."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = plan_batches([len(tokens) for tokens, _ in rows], max_tokens)
    training = model.training
    model.eval()
    try:
        for begin in range(0, len(batches), size):
            # Every rank makes every forward with the others: one without a batch of its own repeats another's.
            at = begin + rank
            indices = batches[min(at, len(batches) - 1)]
            between()
            tokens, labels, mask = (t if t is None else t.to(device) for t in _padded([rows[i] for i in indices]))
            losses, _ = model(tokens, mask=mask, labels=labels, per_token=True)
            if at < len(batches):
                yield indices, losses
    finally:
        model.train(training)


def plan_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Row numbers, longest rows first, so many together that their padded length stays within ``max_tokens``."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _padded(rows: Rows) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens and labels ``[B, N]``, and the mask: None where nothing is padded, else bool ``[B, N, N]`` in which
    padding sees nothing and is seen by nothing."""
    lengths = torch.tensor([len(tokens) for tokens, _ in rows])
    tokens, labels = (torch.nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in zip(*rows, strict=True))
    n = tokens.shape[1]
    real = torch.arange(n) < lengths[:, None]
    labels = labels.masked_fill(~real, IGNORE_INDEX)
    if bool(real.all()):
        return tokens, labels, None
    return tokens, labels, torch.ones(n, n, dtype=torch.bool).tril() & real[:, None] & real[:, :, None]


def _over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """Each rank has its own entries, zeros elsewhere."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    shared = values.to(device)
    dist.all_reduce(shared)
    return shared.cpu()
