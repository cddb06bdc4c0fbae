"""Compiled blocks under FSDP2, with and without activation checkpointing: the step of the uncompiled trainer."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.common.compiling import skip_inductor
from tests.common.tiny_run import SIZES, write_run
from tests.distributed.harness import run_ranks
from tests.distributed.steps import Step, assert_same_step, selected_heads, trainer_step

MODES: dict[str | None, dict[str, Any]] = {
    None: {},
    "full": {"ac_mode": "full"},
    "every_k": {"ac_mode": "every_k", "ac_option": 2},
    "selective": {"ac_mode": "selective"},
}


def checkpointed(mode: str | None) -> dict[str, Any]:
    return {"enable_activation_checkpointing": True, **MODES[mode]} if mode else {}


def method(name: str, **options: Any) -> dict[str, Any]:
    model = {"_component_": "lrdint_tune.models.llama3_2", **SIZES, "method": name, **options}
    return {"model": model, "lam_lr": None}


def compiled_step(file: Path, changes: dict[str, Any]) -> Step:
    skip_inductor()
    return trainer_step(file, {**changes, "compile": True})


def compiled_selection(file: Path, changes: dict[str, Any]) -> list[list[float]]:
    skip_inductor()
    return selected_heads(file, {**changes, "compile": True})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), lr_scheduler=None, clip_grad_norm=None, dataset_val=None)


@cache
def uncompiled(file: Path, size: int) -> Step:
    return run_ranks(trainer_step, size, file, {"model.lam_init": 0.3})[0]


@pytest.mark.parametrize(
    ("size", "mode"),
    [
        pytest.param(size, mode, marks=[] if (size, mode) == (1, "selective") else [pytest.mark.slow])
        for size in (1, 2)
        for mode in MODES
    ],
)
def test_checkpointing(run: Path, size: int, mode: str | None) -> None:
    """Packed batches in four passes a step; the names in the state dict are compared too."""
    changes = {"model.lam_init": 0.3, **checkpointed(mode)}
    for step in run_ranks(compiled_step, size, run, changes):
        assert_same_step(step, uncompiled(run, size), loss=1e-5, gradients=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(method("dex", lam="exponential"), id="dex"),
        pytest.param(method("lmam", n=256, scale=1.0, softmax_map=True), id="lmam"),
    ],
)
def test_bf16(run: Path, model: dict[str, Any]) -> None:
    """A block's parameters come from FSDP2 in bf16; looser, since operations are ordered otherwise."""
    changes = {"dtype": "bf16", **model}
    expected = run_ranks(trainer_step, 2, run, changes)[0]
    for step in run_ranks(compiled_step, 2, run, {**changes, **checkpointed("selective")}):
        assert_same_step(step, expected, loss=1e-3, gradients=5e-2, asleep=("method.a",))


def test_calibration(run: Path) -> None:
    """The heads that an uncompiled run chooses."""
    options = {"heads": "top_entropy", "top_k": 1}
    changes = {**method("dex", **options), "calibration_batches": 2, **checkpointed("full")}
    assert run_ranks(compiled_selection, 1, run, changes) == run_ranks(selected_heads, 1, run, changes)


def inductor_step(file: Path, changes: dict[str, Any]) -> Step:
    return trainer_step(file, {**changes, "compile": True})


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [method("dint", rank=3, lam_init=0.3), method("lmam", n=256, scale=1.0)], ids=["dint", "lmam"]
)
def test_inductor(run: Path, model: dict[str, Any]) -> None:
    changes = {**model, **checkpointed("selective")}
    expected = run_ranks(trainer_step, 2, run, changes)[0]
    for step in run_ranks(inductor_step, 2, run, changes, timeout=280):
        assert_same_step(step, expected, loss=1e-5, gradients=1e-3, asleep=("method.a",))
