"""Held-out losses during training: the ordinary one, and that of tokens predicted from their prefixes alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from lrdint_tune.evaluation.nll import measure_leak
from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.training.compilation import uncompiled
from lrdint_tune.training.data import BatchLoader, together
from lrdint_tune.training.forward import summed_loss
from lrdint_tune.training.pulse import agreed
from lrdint_tune.training.world import World


@torch.no_grad()
def held_out_nll(model: LlamaDecoder, loader: BatchLoader, world: World, *, between: Callable[[], None]) -> float:
    """NLL per trained token over all rows of ``loader``, in nats, teacher-forced; every rank must call it.

    Args:
        between: called before every batch, on all ranks; what it raises ends the validation.

    Raises:
        DataLostError: on all ranks, when one of them cannot read its data any more.
    """
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    model.enable_diagnostics(False)
    model.eval()  # the adapters' dropout
    for batch in together(loader.epoch_batches(), world.device):
        between()
        total[0] += summed_loss(model, loader, batch, world.device).double()
        total[1] += batch.num_label_tokens / world.context_size
    model.train()
    dist.all_reduce(total)
    return float(agreed(total[0] / total[1]))


def leak_values(
    model: LlamaDecoder,
    loader_val: BatchLoader,
    loader: BatchLoader,
    world: World,
    *,
    positions: int,
    between: Callable[[], None],
) -> dict[str, float]:
    """Scalars of the leak (:func:`~lrdint_tune.evaluation.nll.measure_leak`) on held-out and on training rows: NLL from
    prefixes alone, the teacher-forced NLL of the same positions, and their difference with its standard error.

    Every rank must call it.

    Args:
        positions: how many of each.
        between: as for :func:`held_out_nll`.
    """
    model.enable_diagnostics(False)
    values: dict[str, float] = {}
    for group, rows in (("validation_metrics", loader_val), ("training_rows", loader)):
        documents = rows.dataset.documents()
        with uncompiled(model):  # prefixes have every length
            leak = measure_leak(model, documents, positions=positions, device=world.device, between=between)
        values |= {
            f"{group}/prefix_wise_loss": leak.prefix_wise.mean,
            f"{group}/teacher_forced_loss": leak.teacher_forced.mean,
            f"{group}/leak": leak.gap.mean,
            f"{group}/leak_stderr": leak.gap.stderr,
        }
    return values
