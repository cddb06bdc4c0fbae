"""Pre-emption and Ctrl-C: the step is finished and saved, the exit code tells, and the same command goes on."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from lrdint_tune.exit_codes import DONE, INTERRUPTED, PREEMPTED
from lrdint_tune.training.interruption import REPEAT_SECONDS, Interruption
from lrdint_tune.training.trainer import Trainer
from tests.common.tiny_run import read_losses
from tests.distributed.harness import Outcome, run_recipe
from tests.integration.runs import assert_same_losses, checkpoints, finished_run, signal_in, values

NLL = "validation_metrics/loss"


def stopped(config: Path, *overrides: str, code: int = PREEMPTED, size: int = 1, **how: object) -> Outcome:
    """Run until a signal ends it."""
    outcome = run_recipe(config, *overrides, size=size, prepare=[partial(signal_in, **how)])  # type: ignore[arg-type]
    assert outcome.codes == [code] * size, outcome.outputs
    assert not any("Traceback" in text for text in outcome.outputs), outcome.outputs
    return outcome


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "size", "rank"),
    [
        (signal.SIGTERM, PREEMPTED, 1, None),
        (signal.SIGUSR1, PREEMPTED, 2, 1),
        (signal.SIGINT, INTERRUPTED, 2, None),
    ],
)
def test_the_step_is_saved_and_the_run_goes_on(
    config: Path, finished: Path, tmp_path: Path, number: signal.Signals, code: int, size: int, rank: int | None
) -> None:
    """In the second epoch, between two checkpoints; the batch that was taken for the next step is not lost."""
    out = f"output_dir={tmp_path}"
    outcome = stopped(config, out, code=code, size=size, method="_train_step", number=number, step=5, rank=rank)
    assert outcome.outputs[0].count(f"stopped by {number.name}: step 5 of 8 is saved") == 1
    assert [text for text in outcome.outputs[1:] if number.name in text] == []
    assert checkpoints(tmp_path) == ["step-3", "step-5"]
    assert list(read_losses(tmp_path)) == [1, 2, 3, 4, 5]
    finished_run(config, out, size=size)
    assert_same_losses(tmp_path, finished)


@pytest.mark.parametrize("step", [0, 3])
def test_where_there_is_nothing_new_to_save(config: Path, finished: Path, tmp_path: Path, step: int) -> None:
    """Before the first step, and right after a checkpoint."""
    out = f"output_dir={tmp_path}"
    stopped(config, out, method="_train_step", number=signal.SIGTERM, step=step)
    assert checkpoints(tmp_path) == {0: [], 3: ["step-3"]}[step]
    finished_run(config, out)
    assert_same_losses(tmp_path, finished)


def test_twice_without_a_step(config: Path, finished: Path, tmp_path: Path) -> None:
    """A pre-emption right after the start leaves the checkpoint that it started from, here that of an epoch's end."""
    out = f"output_dir={tmp_path}"
    for _ in range(2):
        stopped(config, out, method="_train_step", number=signal.SIGTERM, step=4)
    assert checkpoints(tmp_path) == ["step-3", "step-4"]
    finished_run(config, out)
    assert_same_losses(tmp_path, finished)


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 8])
def test_a_validation_cut_short_is_made_up_for(config: Path, tmp_path: Path, step: int) -> None:
    """In the middle and at the end: its number is that of the undisturbed run."""
    often = "run_val_every_n_steps=4"
    finished_run(config, often, f"output_dir={tmp_path / 'whole'}")
    out = f"output_dir={tmp_path / 'cut'}"
    stopped(config, often, out, method="validate", number=signal.SIGTERM, step=step)
    assert step not in values(tmp_path / "cut", NLL)
    assert not (tmp_path / "cut" / "hf").exists()
    finished_run(config, often, out)
    assert values(tmp_path / "cut", NLL) == pytest.approx(values(tmp_path / "whole", NLL))
    assert_same_losses(tmp_path / "cut", tmp_path / "whole")


def test_set_up_ends_at_once(config: Path, tmp_path: Path) -> None:
    outcome = stopped(config, f"output_dir={tmp_path}", method="_load_model", number=signal.SIGTERM)
    assert "SIGTERM: stopped before the first step, there is nothing to save" in outcome.outputs[0]
    assert checkpoints(tmp_path) == []


def test_results_are_written_to_the_end(config: Path, tmp_path: Path) -> None:
    out = f"output_dir={tmp_path}"
    outcome = stopped(config, out, code=DONE, method="export", number=signal.SIGTERM, step=8)
    assert "SIGTERM: the results are written to the end" in outcome.outputs[0]
    assert (tmp_path / "hf" / "model.safetensors").is_file()


def test_a_second_signal_ends_it_at_once(config: Path, tmp_path: Path) -> None:
    """Though the main thread is busy; what was saved before stands."""
    signals = {"number": signal.SIGTERM, "times": 2}
    outcome = stopped(config, f"output_dir={tmp_path}", code=143, method="_train_step", step=5, **signals)
    assert "SIGTERM: stopped at once" in outcome.outputs[0]
    assert checkpoints(tmp_path) == ["step-3"]


def _signal_after_the_end() -> None:
    original = Interruption.ignore

    def ignore(self: Interruption) -> None:
        original(self)
        time.sleep(REPEAT_SECONDS + 0.2)  # late enough to count as a second one
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)

    Interruption.ignore = ignore  # type: ignore[method-assign]


def test_a_late_signal_changes_nothing(config: Path, tmp_path: Path) -> None:
    """torchrun sends SIGTERM to the other ranks as soon as one has ended."""
    interrupt = partial(signal_in, "_train_step", signal.SIGINT, step=4)
    outcome = run_recipe(config, f"output_dir={tmp_path}", prepare=[interrupt, _signal_after_the_end])
    assert outcome.codes == [INTERRUPTED], outcome.outputs


def _pool_in_training() -> None:
    """End a forked process with SIGTERM, as pools do, while training."""
    original = Trainer._train_step

    def train_step(self: Trainer, *args: object) -> object:
        if self.step == 2:
            child = os.fork()
            if child == 0:
                signal.pause()
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        return original(self, *args)  # type: ignore[arg-type]

    Trainer._train_step = train_step  # type: ignore[method-assign,assignment]


def test_signals_of_child_processes_are_theirs(config: Path, finished: Path, tmp_path: Path) -> None:
    finished_run(config, f"output_dir={tmp_path}", prepare=[_pool_in_training])
    assert_same_losses(tmp_path, finished)
