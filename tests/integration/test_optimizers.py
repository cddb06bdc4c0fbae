"""Optimizers that keep their state in other ways, or are called at other times, through whole runs with a kill."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from tests.common.tiny_run import read_losses, write_model, write_run
from tests.distributed.harness import run_recipe
from tests.integration.runs import KILLED, SHORT, assert_same_losses, checkpoints, finished_run, kill_at, values
from tests.integration.test_nonfinite import NONFINITE, _bad_gradient

EIGHT_BIT = ("optimizer._component_=torchao.optim.AdamW8bit",)


def later(output_dir: Path, step: int) -> dict[int, float]:
    """The losses after ``step``."""
    return {at: loss for at, loss in read_losses(output_dir).items() if at > step}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_updates_in_the_backward_pass(config: Path, tmp_path: Path, size: int) -> None:
    """From the first step or from a checkpoint, it is the run that updates after the pass."""
    after, inside, resumed = (tmp_path / name for name in ("after", "inside", "resumed"))
    one_pass = ("clip_grad_norm=null", f"batch_size={2 // size}", "keep_last_n_checkpoints=3")
    finished_run(config, f"output_dir={after}", *one_pass, size=size)
    finished_run(config, f"output_dir={inside}", *one_pass, "optimizer_in_bwd=true", size=size)
    assert_same_losses(inside, after)
    assert values(inside, "lr_lambda") == values(after, "lr_lambda")
    assert values(inside, "grad_norm") == pytest.approx(values(after, "grad_norm"), rel=1e-4)
    step_3 = f"resume={inside / 'checkpoints' / 'step-3'}"
    finished_run(config, f"output_dir={resumed}", *one_pass, "optimizer_in_bwd=true", step_3, size=size)
    assert_same_losses(resumed, later(after, 3))


def test_bad_gradient_in_the_backward_pass(config: Path, tmp_path: Path) -> None:
    """The message does not claim that nothing was updated; the checkpoint is from before."""
    options = ("clip_grad_norm=null", "batch_size=2", "optimizer_in_bwd=true")
    outcome = run_recipe(config, f"output_dir={tmp_path}", *options, prepare=[partial(_bad_gradient, 4)])
    assert outcome.codes == [NONFINITE], outcome.outputs
    (error,) = outcome.errors
    assert error.startswith("error: step 5: loss ")
    assert "the parameters were already updated with it (optimizer_in_bwd=true)" in error
    assert "no update" not in error
    assert error.endswith("checkpoint step-3 stands")
    assert checkpoints(tmp_path) == ["step-3"]


# ---------------------------------------------------------------------- torchao's 8-bit AdamW


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices of which also half has the 4096 elements from which torchao quantises; λ and norms have not."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"embed_dim": 128, "intermediate_dim": 64, "num_layers": 1}
    write_model(folder / "model", **sizes)
    model = {f"model__{key}": value for key, value in sizes.items()}
    return write_run(folder, **model, **SHORT, trainable=["adapter", "attention", "norms"], optimizer__lr=1e-2)


def eagerly() -> None:
    """torchao compiles the update of every shape of parameter, half a minute each time; the arithmetic is the same."""
    torch.compiler.set_stance("force_eager")


def eight_bit_run(config: Path, output_dir: Path, *overrides: str, size: int = 1) -> Path:
    flags = (f"output_dir={output_dir}", f"batch_size={2 // size}", "keep_last_n_checkpoints=3", *overrides)
    outcome = run_recipe(config, *EIGHT_BIT, *flags, size=size, prepare=[eagerly])
    assert outcome.codes == [0] * size, outcome.outputs
    return output_dir


@pytest.fixture(scope="module")
def whole(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The output folder of an uninterrupted run on that many processes; not to be written to."""
    return cache(lambda size: eight_bit_run(wide, tmp_path_factory.mktemp("whole") / "out", size=size))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_eight_bit_state_is_resumed(
    wide: Path, whole: Callable[[int], Path], tmp_path: Path, before: int, after: int
) -> None:
    """Also on another number of processes: the shards are cut between the same blocks."""
    step_3 = f"resume={whole(before) / 'checkpoints' / 'step-3'}"
    eight_bit_run(wide, tmp_path, step_3, size=after)
    assert_same_losses(tmp_path, later(whole(before), 3))
    rates = values(whole(before), "lr")
    assert values(tmp_path, "lr") == {step: rates[step] for step in range(4, 9)}


@pytest.mark.slow
def test_eight_bits_in_the_backward_pass(wide: Path, tmp_path: Path) -> None:
    free = "clip_grad_norm=null"
    after = eight_bit_run(wide, tmp_path / "after", free, size=2)
    assert_same_losses(eight_bit_run(wide, tmp_path / "inside", free, "optimizer_in_bwd=true", size=2), after)


def test_eight_bits_train_like_thirty_two(wide: Path, whole: Callable[[int], Path], tmp_path: Path) -> None:
    """The same schedule for both groups, nearly the same losses, and a state that is really smaller."""
    finished_run(wide, f"output_dir={tmp_path}", "batch_size=2")
    for tag in ("lr", "lr_lambda"):
        assert values(whole(1), tag) == pytest.approx(values(tmp_path, tag), rel=1e-6)
    losses, expected = read_losses(whole(1)), read_losses(tmp_path)
    assert losses == pytest.approx(expected, abs=0.02)
    assert losses != expected
    assert expected[1] - expected[8] > 0.2, "nothing was learned, nothing is compared"
    written, usual = (
        sum(file.stat().st_size for file in (folder / "checkpoints" / "step-8").iterdir())
        for folder in (whole(1), tmp_path)
    )
    assert written < 0.7 * usual


@pytest.mark.slow
def test_eight_bits_compiled(wide: Path, tmp_path: Path) -> None:
    """As a user runs it: torchao compiles. Two processes, killed and resumed."""
    flags = (*EIGHT_BIT, f"output_dir={tmp_path}", "trainable=[adapter]", "max_steps_per_epoch=2")
    outcome = run_recipe(wide, *flags, size=2, prepare=[partial(kill_at, 3)], timeout=280)
    assert KILLED in outcome.codes
    assert run_recipe(wide, *flags, size=2, timeout=280).codes == [0, 0]
    assert list(read_losses(tmp_path)) == [1, 2, 3, 4]
