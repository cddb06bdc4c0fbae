"""Steps whose loss or gradient is no number: the run ends, or goes on without their update."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lrdint_tune.errors import ReportedError
from lrdint_tune.exit_codes import NONFINITE
from lrdint_tune.training.config import TrainConfig
from lrdint_tune.training.data import Batch

log = logging.getLogger(__name__)


class NonFiniteLossError(ReportedError):
    """The loss or the gradient became NaN or infinite; the message names the step and the rows of the batch."""

    exit_code = NONFINITE


class NonFiniteSteps:
    """What ``on_nonfinite`` asks for: ``stop``, or ``skip_step`` up to ``max_skipped_steps`` times in a run, restarts
    included.

    Attributes:
        skipped: steps skipped so far; belongs to the checkpoint.
    """

    def __init__(self, cfg: TrainConfig) -> None:
        self.skips = cfg.on_nonfinite == "skip_step"
        self.limit = cfg.skipped_steps_limit
        self.skipped = 0

    def metrics(self) -> dict[str, float]:
        """``skipped_steps``, where steps may be skipped."""
        return {"skipped_steps": self.skipped} if self.skips else {}

    def skip(
        self,
        step: int,
        loss: float,
        norm: float,
        batches: Sequence[Batch],
        losses: Sequence[Tensor],
        updated: str,
        standing: Callable[[], str],
    ) -> None:
        """Say where it came from and count the step, whose update the caller leaves out; every rank must call it.

        Args:
            step: the step that was being made.
            loss: average over all ranks.
            norm: of the gradient.
            batches: this rank's micro-batches.
            losses: of each of them.
            updated: what has become of the parameters.
            standing: says which checkpoint there is to go back to; a collective, called before raising.

        Raises:
            NonFiniteLossError: with ``stop``, or when the limit is reached; the same on all ranks.
        """
        happened = f"step {step}: loss {loss}, gradient norm {norm}; {_where(batches, losses)}"
        if self.skips and self.skipped < self.limit:
            self.skipped += 1
            if dist.get_rank() == 0:
                log.warning("%s; skipped, %d of at most %d", happened, self.skipped, self.limit)
            return
        limit = f"max_skipped_steps={self.limit} were skipped before; " if self.skips else ""
        raise NonFiniteLossError(f"{happened}; {limit}{updated}; {standing()}")


def _where(batches: Sequence[Batch], losses: Sequence[Tensor]) -> str:
    """The rows of the micro-batches with such a loss, of all ranks; a collective."""
    bad = [batch for batch, value in zip(batches, losses, strict=True) if not torch.isfinite(value)]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, rows_of(bad))
    rows = sorted({row for part in gathered for row in part})
    if not rows:
        return f"dataset rows {rows_of(batches)[:20]} (loss finite, gradient not)"
    return f"dataset rows {rows[:20]}{' ...' if len(rows) > 20 else ''}"


def rows_of(batches: Sequence[Batch]) -> list[int]:
    """The rows of the dataset in these batches, in order."""
    return sorted({int(row) for batch in batches for row in batch.row_ids})
