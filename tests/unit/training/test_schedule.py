"""Schedules over learning rates that are numbers, and over those that torchao keeps in tensors."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lrdint_tune.training.schedule import learning_rates, restore_schedule, schedule_state, set_rate


def build(kind: Any, lr: float = 3e-3, lam_lr: float = 7e-2) -> tuple[torch.optim.Optimizer, LRScheduler]:
    groups: list[dict[str, Any]] = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": kind(lr)},
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": kind(lam_lr), "name": "lambda"},
    ]
    optimizer = torch.optim.AdamW(groups, foreach=False, capturable=False)
    return optimizer, LambdaLR(optimizer, lambda step: 0.9**step)


def advance(optimizer: torch.optim.Optimizer, scheduler: LRScheduler, steps: int) -> list[dict[str, float]]:
    rates = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        rates.append(learning_rates(optimizer))
    return rates


@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["float", "tensor"])
def test_a_resumed_schedule_goes_on_with_the_same_bits(kind: Any) -> None:
    rates = advance(*build(kind), 6)
    assert rates[0] == pytest.approx({"lr": 2.7e-3, "lr_lambda": 6.3e-2})
    optimizer, scheduler = build(kind)
    advance(optimizer, scheduler, 3)
    state = json.loads(json.dumps(schedule_state(scheduler)))
    other, its_scheduler = build(kind)
    assert restore_schedule(its_scheduler, state)
    assert learning_rates(other) == rates[2]
    assert advance(other, its_scheduler, 3) == rates[3:]
    assert isinstance(other.param_groups[0]["lr"], Tensor) == (kind is torch.tensor)


@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["float", "tensor"])
def test_another_rate_is_told_and_does_not_count(kind: Any) -> None:
    optimizer, scheduler = build(kind)
    advance(optimizer, scheduler, 3)
    other, its_scheduler = build(kind, lr=1.0)
    assert not restore_schedule(its_scheduler, schedule_state(scheduler))
    assert learning_rates(other) == learning_rates(optimizer)


def test_a_tensor_stays_the_same_tensor() -> None:
    """torchao compiles with it."""
    group: dict[str, Any] = {"lr": torch.tensor(0.5)}
    tensor = group["lr"]
    set_rate(group, 0.25)
    assert group["lr"] is tensor and tensor == 0.25
