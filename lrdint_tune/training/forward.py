"""A batch through the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lrdint_tune.attention import DocumentMask
from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.training.data import Batch, BatchLoader
from lrdint_tune.training.data.watch import together
from lrdint_tune.training.pulse import agreed
from lrdint_tune.training.world import World


def model_inputs(loader: BatchLoader, batch: Batch, device: torch.device, *, mask_padding: bool) -> dict[str, Any]:
    """The model's arguments for a micro-batch, on ``device``."""
    # Unpacked rows mostly need no mask: nothing before the padding on their right can see it.
    mask: DocumentMask | Tensor | None = DocumentMask(batch.lengths) if loader.packed else None
    if mask_padding:
        mask = batch.dense_mask().to(device)
    tokens, labels, input_pos = (t.to(device) for t in (batch.tokens, batch.labels, batch.input_pos))
    return {"tokens": tokens, "mask": mask, "input_pos": input_pos, "labels": labels}


def summed_loss(model: LlamaDecoder, loader: BatchLoader, batch: Batch, device: torch.device) -> Tensor:
    """Sum of the token losses of a micro-batch, in nats."""
    needs_ends = any(method.needs_document_ends for method in model.methods())
    return model(**model_inputs(loader, batch, device, mask_padding=needs_ends))


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
