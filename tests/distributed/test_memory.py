"""The ways of saving memory: each does what it says, and the run is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import CPUOffloadPolicy

from lrdint_tune.training import offloading, sharding, trainer, updates
from tests.common.tiny_run import write_run
from tests.distributed.harness import run_ranks
from tests.distributed.steps import assert_same_step, gathers, start_trainer, trainer_step

# λ away from 0, so that every new tensor has a gradient.
DINT = {"model.lam_init": 0.3}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), clip_grad_norm=None, dataset_val=None)


def whole_passes(size: int) -> dict[str, Any]:
    """One pass a step."""
    return {"global_batch_size": 4, "batch_size": 4 // size, **DINT}


def steps(file: Path, changes: dict[str, Any], count: int = 4) -> list[dict[str, float]]:
    """The scalars of the first steps."""
    run = start_trainer(file, changes)
    return [run._train_step(logging_step=True)[0] for _ in range(count)]


def test_blocks_that_stay_gathered_are_gathered_once(run: Path) -> None:
    """Two blocks and the root in the forward pass; in the backward pass the blocks again, or nothing."""
    freed, kept = (
        run_ranks(gathers, 2, run, {**whole_passes(2), "fsdp_reshard_after_forward": value})[0]
        for value in (True, False)
    )
    assert (freed, kept) == (5, 3)


def test_blocks_that_stay_gathered_compute_the_same(run: Path) -> None:
    freed, kept = (
        run_ranks(trainer_step, 2, run, {**whole_passes(2), "fsdp_reshard_after_forward": value})[0]
        for value in (True, False)
    )
    assert_same_step(kept, freed, loss=0, gradients=0)


# ---------------------------------------------------------------------- optimizer_in_bwd


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        pytest.param((1, 1), {"foreach": True}, id="one process, foreach"),
        pytest.param((1, 2), {}, id="two processes"),
        pytest.param((1, 2), {"fused": True}, id="two processes, fused"),
        pytest.param((2, 1), {"_component_": "torch.optim.SGD", "momentum": 0.9}, id="two replicas, SGD"),
    ],
)
def test_updates_in_the_backward_pass_are_the_same(run: Path, mesh: tuple[int, int], options: dict[str, Any]) -> None:
    """Losses and learning rates with the same bits over several steps; the norms that are recorded, but for the order
    of their sums."""
    replicate, shard = mesh
    changes: dict[str, Any] = {
        **whole_passes(replicate * shard),
        "data_parallel_replicate_dim": replicate,
        "trainable": ["all"],
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-2, **options},
    }
    after, inside = (
        run_ranks(steps, replicate * shard, run, {**changes, "optimizer_in_bwd": value}) for value in (False, True)
    )
    for expected, actual in zip(after[0], inside[0], strict=True):
        assert actual == pytest.approx(expected, rel=1e-5)
        for tag in ("loss_metrics/global_avg_loss", "lr", "lr_lambda"):
            assert actual[tag] == expected[tag]
    assert len({values["loss_metrics/global_avg_loss"] for values in after[0]}) == 4
    assert "adapter_grad_norm/layers.1" in inside[0][0]


def count_updates(file: Path, changes: dict[str, Any]) -> tuple[list[int], int, int]:
    """How many gradients there are whenever the optimizer is called in one step, the number of trained parameters, and
    the gradients left at its end."""
    run = start_trainer(file, changes)
    held = []
    step = run.optimizer.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        held.append(sum(p.grad is not None for p in run.model.parameters()))
        return step(*args, **kwargs)

    run.optimizer.step = watched  # type: ignore[method-assign]
    run._train_step(logging_step=False)
    trained = sum(p.requires_grad for p in run.model.parameters())
    return held, trained, sum(p.grad is not None for p in run.model.parameters())


def test_gradients_are_freed_one_by_one(run: Path) -> None:
    """Frozen parameters have no hook; FSDP2 hands over the parameters of a block one after the other."""
    held, trained, left = run_ranks(count_updates, 2, run, {**whole_passes(2), "optimizer_in_bwd": True})[0]
    assert held == [1] * trained
    assert left == 0
    held, trained, left = run_ranks(count_updates, 2, run, whole_passes(2))[0]
    assert (held, left) == ([trained], 0)


def test_only_shows_one_parameter_and_puts_the_others_back() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.5}], lr=0.1)
    groups = optimizer.param_groups
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    with pytest.raises(KeyError), updates.only(optimizer, 1, parameters[2]):
        optimizer.step()
        raise KeyError
    assert [parameter.tolist() for parameter in parameters] == [[0, 0], [0, 0], [-0.5, -0.5]]
    assert optimizer.param_groups is groups
    assert [len(group["params"]) for group in groups] == [2, 1]


# ---------------------------------------------------------------------- what only CUDA has use for


class _Tracker(saved_tensors_hooks):
    """What torchtune's OffloadActivations asks of a model: each saved tensor is asked for exactly once, and none is
    left when the next forward pass begins. Nothing travels."""

    instances: list[_Tracker] = []

    def __init__(self) -> None:
        self.held: dict[int, Tensor] = {}
        self.shapes: list[tuple[int, ...]] = []
        self.instances.append(self)
        super().__init__(self.pack, self.held.pop)

    def pack(self, tensor: Tensor) -> int:
        self.shapes.append(tuple(tensor.shape))
        self.held[len(self.shapes)] = tensor.clone()  # another memory
        return len(self.shapes)


def offloaded_steps(file: Path, changes: dict[str, Any]) -> tuple[list[dict[str, float]], list[tuple[int, ...]]]:
    """As :func:`steps`, and the shapes of what would have travelled in the last."""
    trainer.check_device = lambda *_: None  # type: ignore[attr-defined]
    offloading.OffloadActivations = _Tracker  # type: ignore[assignment,misc]
    run = start_trainer(file, changes)
    (tracker,) = _Tracker.instances
    values = []
    for _ in range(3):
        tracker.shapes.clear()
        values.append(run._train_step(logging_step=True)[0])
        assert not tracker.held
    return values, tracker.shapes


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activations_that_wait_elsewhere(run: Path, mode: str) -> None:
    """The input of each block and nothing else travels, and comes back once."""
    changes = {**whole_passes(2), "enable_activation_checkpointing": True, "ac_mode": mode}
    expected = run_ranks(steps, 2, run, changes, 3)[0]
    values, shapes = run_ranks(offloaded_steps, 2, run, {**changes, "enable_activation_offloading": True})[0]
    assert values == expected
    hidden = (2, 512, 32)
    assert [shape for shape in shapes if len(shape) == 3] == [hidden, hidden]
    assert all(len(shape) < 2 for shape in shapes if shape != hidden), shapes


def cpu_offloaded_steps(file: Path, changes: dict[str, Any]) -> list[dict[str, float]]:
    """As :func:`steps`, with FSDP2's way of parameters that are elsewhere; here the other place is the same."""
    seen = []

    class Policy(CPUOffloadPolicy):
        def __init__(self) -> None:
            super().__init__(pin_memory=False)
            seen.append(self)

    sharding.CPUOffloadPolicy = Policy  # type: ignore[misc]
    trainer.check_device = lambda *_: None  # type: ignore[attr-defined]
    values = steps(file, changes)
    assert seen
    return values


@pytest.mark.parametrize("inside", [False, True])
def test_parameters_that_are_kept_elsewhere(run: Path, inside: bool) -> None:
    changes = {**whole_passes(2), "optimizer_in_bwd": inside}
    expected = run_ranks(steps, 2, run, changes)[0]
    assert run_ranks(cpu_offloaded_steps, 2, run, {**changes, "fsdp_cpu_offload": True})[0] == expected
