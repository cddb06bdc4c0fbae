"""Learning rates, which some optimizers (torchao's) keep in tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lrdint_tune.training.trainable import LAMBDA_GROUP


def set_rate(group: dict[str, Any], rate: float | Tensor) -> None:
    """Give an optimizer's parameter group another learning rate."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(float(rate))
    else:
        group["lr"] = rate


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """``lr``, and ``lr_lambda`` where λ has a group of its own."""
    rates = {"lr": float(optimizer.param_groups[0]["lr"])}
    for group in optimizer.param_groups:
        if group.get("name") == LAMBDA_GROUP:
            rates["lr_lambda"] = float(group["lr"])
    return rates


def schedule_state(scheduler: LRScheduler) -> dict[str, Any]:
    """The scheduler's state in JSON's types."""
    return _plain(scheduler.state_dict())


def restore_schedule(scheduler: LRScheduler, state: dict[str, Any]) -> bool:
    """Go on from what :func:`schedule_state` gave, in the scheduler and in its optimizer.

    Returns:
        Whether the learning rates it began with are those of ``state``. If not, ``state``'s count.
    """
    began_with = scheduler.base_lrs
    scheduler.load_state_dict(state)
    # As tensors where they were: a product with one is rounded to float32, with a float it is not.
    scheduler.base_lrs = [
        torch.tensor(rate) if isinstance(old, Tensor) else rate
        for old, rate in zip(began_with, state["base_lrs"], strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        set_rate(group, rate)
    return _plain(began_with) == state["base_lrs"]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value
