"""With the base frozen, a method learns what the base cannot: tasks whose optimum is known.

The bases are trained first, on a mixture in which the right answer is that of one of two places, by a toss of a coin:
the best they can do is to look at both. The task then is always the first place. With the branch at zero the frozen
base's loss stays where it was; a method that moves the attention off the other place reaches 0.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lrdint_tune.hosts import attach, load, method_parameters, save, set_trainable
from tests.common.hosts import tiny

SYMBOLS, LENGTH, BATCH = 8, 12, 64
HALF = math.log(2)
Batch = Callable[[float], tuple[dict[str, Tensor], Tensor]]


def copy_batch(first: float) -> tuple[dict[str, Tensor], Tensor]:
    """Random tokens; position i is to name token i-2 with probability ``first``, else i-1."""
    ids = torch.randint(SYMBOLS, (BATCH, LENGTH))
    labels = torch.where(torch.rand(ids.shape) < first, ids.roll(2, 1), ids.roll(1, 1))
    labels[:, :2] = -100
    return {"input_ids": ids}, labels


def class_batch(first: float) -> tuple[dict[str, Tensor], Tensor]:
    """The class (upper or lower half of the symbols) of token 1 with probability ``first``, else of token 2."""
    ids = torch.randint(3, 3 + SYMBOLS, (BATCH, LENGTH))
    ids[:, 0] = 0
    place = torch.where(torch.rand(BATCH) < first, 1, 2)
    return {"input_ids": ids}, (ids.gather(1, place[:, None])[:, 0] >= 3 + SYMBOLS // 2).long()


TASKS: dict[str, tuple[Batch, float]] = {
    # Both places disagree in 7 of 8 cases; then the base's best is ln 2 (a little more for the other symbols).
    "gpt2": (copy_batch, 7 / 8 * HALF),
    # They disagree in half of the cases.
    "roberta": (class_batch, HALF / 2),
}

# λ held at 0; a scale at which the map cannot move.
PINNED: dict[str, dict[str, Any]] = {"daa": {"lam": "fixed", "lam_init": 0.0}, "lmam": {"scale": 1e-9}}


def loss_of(model: Any, batch: Batch, first: float) -> Tensor:
    inputs, labels = batch(first)
    return F.cross_entropy(model(**inputs).logits.flatten(0, -2), labels.flatten(), ignore_index=-100)


def train(model: Any, batch: Batch, first: float, steps: int, groups: list[dict[str, Any]]) -> None:
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch, first).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def measure(model: Any, batch: Batch) -> float:
    torch.manual_seed(99)
    return sum(loss_of(model, batch, 1.0).item() for _ in range(10)) / 10


@pytest.fixture(scope="module", params=TASKS)
def base(request: pytest.FixtureRequest) -> tuple[str, Any]:
    torch.manual_seed(1)
    host = request.param
    if host == "gpt2":
        model = tiny("gpt2", torch.float32, vocab_size=SYMBOLS)
    else:
        model = tiny("roberta", torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    train(model, TASKS[host][0], 0.5, 500, [{"params": list(model.parameters()), "lr": 5e-3}])
    return host, model


@pytest.mark.slow
@pytest.mark.parametrize("method", ["daa", "lmam"])
def test_loss_falls_below_that_of_the_pinned_branch(base: tuple[str, Any], method: str, tmp_path: Path) -> None:
    host, pretrained = base
    batch, optimum_of_base = TASKS[host]
    options: dict[str, Any] = {"lam": "learned"} if method == "daa" else {"n": LENGTH, "scale": 1.0}
    start = measure(pretrained, batch)
    assert optimum_of_base - 0.02 < start < optimum_of_base + 0.05, "the base is at its optimum"
    pinned = attach(copy.deepcopy(pretrained), method, **{**options, **PINNED[method]})
    set_trainable(pinned, ["adapter"])
    train(pinned, batch, 1.0, 10, [{"params": list(method_parameters(pinned).values()), "lr": 2e-2}])
    assert abs(measure(pinned, batch) - start) < 1e-4

    model = attach(copy.deepcopy(pretrained), method, **options)
    set_trainable(model, ["adapter"])
    train(model, batch, 1.0, 300, [{"params": list(method_parameters(model).values()), "lr": 2e-2}])
    after = measure(model, batch)
    assert after < 0.05 < 0.3 < start
    save(model, tmp_path / "out")
    loaded = load(copy.deepcopy(pretrained), tmp_path / "out")
    inputs, _ = batch(1.0)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
