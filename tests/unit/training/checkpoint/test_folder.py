"""Which checkpoints there are, and how they come and go."""

import multiprocessing
import os
from pathlib import Path

import pytest

from lrdint_tune.errors import ConfigError
from lrdint_tune.training.checkpoint.folder import LOCK_FILE, CheckpointFolder


def folder(path: Path, keep: int = 2) -> CheckpointFolder:
    return CheckpointFolder(path, keep_last_n=keep)


def pretend(path: Path, *names: str) -> None:
    for name in names:
        (path / name).mkdir(parents=True)
        (path / name / "shard").write_text(name)


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_only_published_checkpoints_count(tmp_path: Path) -> None:
    assert folder(tmp_path / "absent").steps() == []
    pretend(tmp_path, "step-10", "step-9", "step-100", "step-202.partial", "mystep-203", "damaged-step-300", "step-")
    (tmp_path / "step-7").write_text("a file")
    assert folder(tmp_path).steps() == [9, 10, 100]


def test_recover_removes_what_never_became_complete(tmp_path: Path) -> None:
    pretend(tmp_path, "step-3", "step-6.partial")
    folder(tmp_path).recover()
    assert names(tmp_path) == ["step-3"]


def test_publish_keeps_the_latest(tmp_path: Path) -> None:
    checkpoints = folder(tmp_path, keep=2)
    for step in (1, 2, 3):
        pretend(tmp_path, f"step-{step}.partial")
        checkpoints.publish(step)
    assert names(tmp_path) == ["step-2", "step-3"]
    assert (tmp_path / "step-3" / "shard").read_text() == "step-3.partial"


def test_what_cannot_be_removed_is_no_fault_of_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A network file system keeps a file that somebody reads."""
    checkpoints = folder(tmp_path, keep=1)
    pretend(tmp_path, "step-1", "step-2.partial")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", lambda *_, **__: (_ for _ in ()).throw(OSError(39, "Directory not empty")))
        checkpoints.publish(2)
        checkpoints.recover()
    assert checkpoints.steps() == [2] and names(tmp_path) == ["step-1.partial", "step-2"]
    assert "step-1.partial cannot be removed now" in caplog.text
    pretend(tmp_path, "step-3.partial")
    checkpoints.publish(3)
    checkpoints.recover()
    assert names(tmp_path) == ["step-3"]


def test_later_checkpoints_are_set_aside(tmp_path: Path) -> None:
    pretend(tmp_path, "step-3", "step-6", "step-9")
    folder(tmp_path).set_aside_after(3)
    assert names(tmp_path) == ["set-aside-1", "step-3"]
    assert names(tmp_path / "set-aside-1") == ["step-6", "step-9"]
    folder(tmp_path).set_aside_after(3)
    folder(tmp_path).set_aside_after(0)
    assert names(tmp_path) == ["set-aside-1", "set-aside-2"]


def test_damaged_ones_are_kept_under_another_name(tmp_path: Path) -> None:
    for aside in ("damaged-step-3", "damaged-step-3-2", "damaged-step-3-3"):
        pretend(tmp_path, "step-3")
        assert folder(tmp_path).set_aside_damaged(3).name == aside
    assert folder(tmp_path).steps() == []


def test_unwritable_folder_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output_dir: cannot write to .*choose a writable folder"):
        folder(tmp_path / "file" / "checkpoints").claim()
    folder(tmp_path / "new").claim()
    assert names(tmp_path / "new") == [LOCK_FILE]


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    first = folder(tmp_path)
    first.claim()
    with pytest.raises(ConfigError, match=rf"another run \(process {os.getpid()} on .*another output_dir"):
        folder(tmp_path).claim(patience=0.3)
    first.release()
    second = folder(tmp_path)
    second.claim(patience=0)
    second.release()


def _claim_and_die(path: Path) -> None:
    folder(path).claim()
    os.kill(os.getpid(), 9)


def test_a_dead_run_does_not_keep_the_folder(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_claim_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -9
    folder(tmp_path).claim(patience=0)
