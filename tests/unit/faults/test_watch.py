"""What counts as a lost checkpoint, and what does not."""

import shutil
from pathlib import Path

import pytest

from lrdint_tune.faults.watch import CheckpointWatch


def publish(folder: Path, step: int, content: str = "tensors") -> Path:
    path = folder / f"step-{step}"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_text(content)
    (path / "train_state.json").write_text("{}")
    return path


@pytest.fixture
def watch(tmp_path: Path) -> CheckpointWatch:
    """Looks only when asked to: no thread."""
    return CheckpointWatch(tmp_path, keep_last_n=2)


def test_pruning_is_no_loss(tmp_path: Path, watch: CheckpointWatch) -> None:
    oldest = publish(tmp_path, 8)
    watch.check()
    publish(tmp_path, 9)
    publish(tmp_path, 10)
    shutil.rmtree(oldest)
    watch.check()
    assert watch.lost == []


def test_a_checkpoint_that_vanishes_with_too_few_newer_ones_is_lost(tmp_path: Path, watch: CheckpointWatch) -> None:
    oldest = publish(tmp_path, 8)
    publish(tmp_path, 9)
    watch.check()
    shutil.rmtree(oldest)
    watch.check()
    watch.check()
    assert watch.lost == ["step-8 vanished with 1 newer ones there"]


def test_a_checkpoint_that_changes_is_lost(tmp_path: Path, watch: CheckpointWatch) -> None:
    path = publish(tmp_path, 8)
    watch.check()
    (path / "__0_0.distcp").write_text("other")
    watch.check()
    watch.check()
    assert watch.lost == ["step-8 changed after it was published"]


def test_an_unfinished_one_does_not_count(tmp_path: Path, watch: CheckpointWatch) -> None:
    partial = publish(tmp_path, 8).rename(tmp_path / "step-8.partial")
    watch.check()
    shutil.rmtree(partial)
    watch.check()
    assert watch.lost == []


def test_a_damaged_one_may_go_and_its_successor_may_not(tmp_path: Path, watch: CheckpointWatch) -> None:
    path = publish(tmp_path, 8)
    watch.damaged(8)
    (path / "__0_0.distcp").unlink()
    watch.check()
    path.rename(tmp_path / "damaged-step-8")
    watch.check()
    assert watch.lost == []
    again = publish(tmp_path, 8)
    watch.check()
    shutil.rmtree(again)
    watch.check()
    assert watch.lost == ["step-8 vanished with 0 newer ones there"]


def test_its_thread_sees_what_comes_and_goes_between_checks(tmp_path: Path) -> None:
    with CheckpointWatch(tmp_path, keep_last_n=1) as watch:
        path = publish(tmp_path, 8)
        while 8 not in watch._digests:
            pass
        shutil.rmtree(path)
        while not watch.lost:
            pass
    assert watch.lost == ["step-8 vanished with 0 newer ones there"]
