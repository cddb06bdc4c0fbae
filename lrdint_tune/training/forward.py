"""A batch through the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrdint_tune.attention import DocumentMask
from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.training.data import Batch, BatchLoader


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
