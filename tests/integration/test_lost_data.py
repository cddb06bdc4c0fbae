"""The data vanish while a run reads them: the last finished step is saved, every rank ends with code 7, and with the
data back the run goes on as if nothing had been."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lrdint_tune.errors import DataLostError
from lrdint_tune.exit_codes import DATA_LOST
from lrdint_tune.training.data import BatchLoader
from lrdint_tune.training.trainer import Trainer
from tests.common.tiny_run import read_losses
from tests.distributed.harness import run_recipe
from tests.integration.runs import assert_same_losses, checkpoints, finished_run, values

pytestmark = pytest.mark.slow


def _damage(step: int, how: str) -> None:
    """Remove or truncate what the training rows are read from, before the step after ``step``."""
    original = Trainer._train_step

    def train_step(self: Trainer, *args: Any) -> Any:
        if self.step == step and dist.get_rank() == 0:
            (file,) = [path for path, _, _ in self.loader.dataset.files._held]
            if how == "removed":
                os.unlink(file)
            else:
                os.truncate(file, 100)
        dist.barrier()
        return original(self, *args)

    Trainer._train_step = train_step  # type: ignore[method-assign]


def _lose(position: int, rank: int, *, training: bool, visit: int = 1) -> None:
    """Let ``rank`` alone find the data lost, when the loader of that kind reads ``position`` for the ``visit``-th
    time."""
    original = BatchLoader._batch_at
    visits = [0]

    def batch_at(self: BatchLoader, at: int) -> Any:
        if dist.get_rank() == rank and self.drop_last == training and at == position:
            visits[0] += 1
            if visits[0] == visit:
                raise DataLostError("some.arrow: gone")
        return original(self, at)

    BatchLoader._batch_at = batch_at  # type: ignore[method-assign]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("how", ["removed", "truncated"])
def test_file_of_the_data(config: Path, tmp_path: Path, finished: Path, how: str, size: int) -> None:
    options = [f"output_dir={tmp_path / 'out'}", f"dataset.cache_dir={tmp_path / 'cache'}"]
    outcome = run_recipe(config, *options, size=size, prepare=[partial(_damage, 4, how)])
    assert outcome.codes == [DATA_LOST] * size, outcome.outputs
    (error,) = outcome.errors
    reason = "No such file" if how == "removed" else "has 100 of "
    assert str(tmp_path / "cache") in error and reason in error and "(rank 0, host " in error
    assert "Traceback" not in "".join(outcome.outputs)
    assert checkpoints(tmp_path / "out") == ["step-3", "step-4"]
    if how == "truncated":
        (damaged,) = (tmp_path / "cache").rglob("cache-*.arrow")
        damaged.unlink()
    finished_run(config, *options, size=size)
    if size == 1:
        assert_same_losses(tmp_path / "out", finished)
    assert list(read_losses(tmp_path / "out")) == list(range(1, 9))


def test_only_one_rank_and_one_pass(config: Path, tmp_path: Path) -> None:
    """Rank 1 misses the second of the step's two passes: rank 0, which has both, ends too, and no row is skipped."""
    options = ["global_batch_size=4", "max_steps_per_epoch=4"]
    whole, out = f"output_dir={tmp_path / 'whole'}", f"output_dir={tmp_path / 'out'}"
    finished_run(config, whole, *options, size=2)
    outcome = run_recipe(config, out, *options, size=2, prepare=[partial(_lose, 6, 1, training=True)])
    assert outcome.codes == [DATA_LOST] * 2, outcome.outputs
    (error,) = outcome.errors
    assert error.startswith("error: some.arrow: gone (rank 1, host ")
    assert checkpoints(tmp_path / "out") == ["step-1"]
    finished_run(config, out, *options, size=2)
    assert_same_losses(tmp_path / "out", tmp_path / "whole")


def test_validation(config: Path, tmp_path: Path) -> None:
    """The last step's validation finds the data lost on one rank: the step is saved all the same."""
    out = f"output_dir={tmp_path}"
    outcome = run_recipe(config, out, size=2, prepare=[partial(_lose, 0, 1, training=False, visit=2)])
    assert outcome.codes == [DATA_LOST] * 2, outcome.outputs
    assert checkpoints(tmp_path) == ["step-6", "step-8"]
    assert list(values(tmp_path, "validation_metrics/loss")) == [0]
    assert not (tmp_path / "hf").exists()
    finished_run(config, out, size=2)
    assert (tmp_path / "hf").exists()


def test_calibration(config: Path, tmp_path: Path) -> None:
    """Before the first step there is nothing to save."""
    options = ["model.method=dex", "~model.rank", "model.heads=top_entropy"]
    prepare = [partial(_lose, 2, 1, training=True)]
    outcome = run_recipe(config, f"output_dir={tmp_path}", *options, size=2, prepare=prepare)
    assert outcome.codes == [DATA_LOST] * 2, outcome.outputs
    assert len(outcome.errors) == 1
    assert checkpoints(tmp_path) == []
