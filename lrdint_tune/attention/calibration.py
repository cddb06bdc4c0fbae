"""Showing batches to the methods whose start depends on the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrdint_tune.attention.methods.base import AttentionMethod


@torch.no_grad()
def calibrate(
    model: nn.Module,
    methods: Iterable[AttentionMethod],
    batches: Iterable[Mapping[str, Any]],
    *,
    reduce: Callable[[Tensor], Any] | None = None,
) -> None:
    """Let ``methods`` choose what depends on the data (``dex`` with ``heads: top_entropy``: its heads); nothing is done
    where none of them wants to.

    Args:
        model: carries them; without dropout while it runs.
        batches: keyword arguments of its forward, one mapping per batch.
        reduce: adds a float32 tensor up over processes, in place; None for one process.
    """
    choosing = [method for method in methods if method.needs_calibration]
    if not choosing:
        return
    sums = [method.start_calibration() for method in choosing]
    training = model.training
    model.eval()
    for batch in batches:
        model(**batch)
    model.train(training)
    for method, total in zip(choosing, sums, strict=True):
        if reduce is not None:
            reduce(total)
        method.finish_calibration()
