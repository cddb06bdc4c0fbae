"""In which number formats a model is kept and computed."""

from __future__ import annotations

import torch
from torch import nn

from lrdint_tune.training.trainable import is_lambda


def set_precision(model: nn.Module, dtype: str) -> None:
    """Trainable parameters stay float32 (bf16 master weights swallow small updates); with ``dtype: bf16`` frozen ones
    become bf16, λ excepted."""
    if dtype == "bf16":
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and not is_lambda(name):
                parameter.data = parameter.data.to(torch.bfloat16)
