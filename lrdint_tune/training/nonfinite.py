"""The end of a run whose loss or gradient is no number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from lrdint_tune.training.data import Batch


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient became NaN or infinite; the message names the step and the rows of the batch."""


def stop_for_nonfinite(
    step: int,
    loss: float,
    norm: float,
    batches: Sequence[Batch],
    losses: Sequence[Tensor],
    updated: str,
    standing: str,
) -> NoReturn:
    """Say where it came from; every rank must call it.

    Args:
        step: the step that was being made.
        loss: average over all ranks.
        norm: of the gradient.
        batches: this rank's micro-batches.
        losses: of each of them.
        updated: what has become of the parameters.
        standing: which checkpoint there is to go back to.

    Raises:
        NonFiniteLossError: always.
    """
    bad = [batch for batch, value in zip(batches, losses, strict=True) if not torch.isfinite(value)]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, rows_of(bad))
    rows = sorted({row for part in gathered for row in part})
    where = (
        f"dataset rows {rows[:20]}{' ...' if len(rows) > 20 else ''}"
        if rows
        else f"dataset rows {rows_of(batches)[:20]} (loss finite, gradient not)"
    )
    raise NonFiniteLossError(f"step {step}: loss {loss}, gradient norm {norm}; {where}; {updated}; {standing}")


def rows_of(batches: Sequence[Batch]) -> list[int]:
    """The rows of the dataset in these batches, in order."""
    return sorted({int(row) for batch in batches for row in batch.row_ids})
