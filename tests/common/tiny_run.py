"""A complete little run: the one that the fault harness ships with, for tests."""

from __future__ import annotations

from typing import Any

import torch

from lrdint_tune.faults.record import read_losses
from lrdint_tune.faults.tiny_run import SIZES, write_model, write_run, write_tokenizer
from lrdint_tune.models import LlamaDecoder, llama3_2

__all__ = ["SIZES", "read_losses", "tiny_dint", "write_model", "write_run", "write_tokenizer"]


def tiny_dint(device: str = "cpu", **options: Any) -> LlamaDecoder:
    """The run's model with method ``dint``, randomly initialised."""
    with torch.device(device):
        return llama3_2(**{**SIZES, "method": "dint", "rank": 2, **options})
