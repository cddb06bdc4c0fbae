"""A save that is killed, wherever it is, leaves the earlier checkpoint as it was; the next start cleans up."""

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lrdint_tune.export.safetensors_file import SafetensorsFile
from lrdint_tune.training.checkpoint import folder as folder_module
from lrdint_tune.training.checkpoint import manager as manager_module
from lrdint_tune.training.checkpoint.folder import CheckpointFolder
from lrdint_tune.training.checkpoint.storage import CheckpointWriter
from tests.distributed.harness import run_recipe
from tests.integration.runs import KILLED, assert_same_losses, checkpoints, finished_run, killed, tree

pytestmark = pytest.mark.slow


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_instead(owner: Any, name: str, text: str) -> None:
    """Kill the process when ``owner.name`` is called with an argument that contains ``text``."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if any(text in str(arg) for arg in (*args, *kwargs.values())):
            _die()
        return original(*args, **kwargs)

    setattr(owner, name, call)


def _die_in_a_shard(step: int) -> None:
    """Leave half of a file of the checkpoint of ``step``."""
    original = CheckpointWriter.write_data

    def write_data(self: CheckpointWriter, plan: Any, planner: Any) -> Any:
        result = original(self, plan, planner)
        if Path(self.path).name == f"step-{step}.partial":
            shard = Path(self.path) / "__0_0.distcp"
            os.truncate(shard, shard.stat().st_size // 2)
            _die()
        return result

    CheckpointWriter.write_data = write_data  # type: ignore[method-assign]


def at_metadata() -> None:
    """The shards stand, their index does not."""
    original = CheckpointWriter.finish

    def finish(self: CheckpointWriter, metadata: Any, results: Any) -> None:
        if Path(self.path).name == "step-6.partial":
            _die()
        original(self, metadata, results)

    CheckpointWriter.finish = finish  # type: ignore[method-assign]


def at_state_file() -> None:
    _die_instead(manager_module, "write_manifest", "step-6.partial")


def at_rename() -> None:
    _die_instead(os, "rename", "step-6.partial")


def at_flush() -> None:
    """After the rename."""
    original = folder_module.flush

    def sync(path: Path) -> None:
        if (path / "step-6").exists():
            _die()
        original(path)

    folder_module.flush = sync


def at_pruning() -> None:
    """step-3 half removed, after step-8 stands."""
    original = shutil.rmtree

    def rmtree(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).name.startswith("step-3"):
            (Path(path) / "__0_0.distcp").unlink()
            _die()
        original(path, *args, **kwargs)

    shutil.rmtree = rmtree  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("kill", "standing"),
    [
        pytest.param(partial(_die_in_a_shard, 6), [3], id="shard"),
        pytest.param(at_metadata, [3], id="metadata"),
        pytest.param(at_state_file, [3], id="state file"),
        pytest.param(at_rename, [3], id="rename"),
        pytest.param(at_flush, [3, 6], id="flush"),
        pytest.param(at_pruning, [6, 8], id="pruning"),
    ],
)
def test_killed_save(
    config: Path, finished: Path, stopped: Path, tmp_path: Path, kill: Callable[[], None], standing: list[int]
) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    outcome = run_recipe(config, f"output_dir={tmp_path}", prepare=[kill])
    assert outcome.codes == [KILLED], outcome.outputs
    assert CheckpointFolder(tmp_path / "checkpoints", keep_last_n=2).steps() == standing
    if 3 in standing:
        assert tree(tmp_path / "checkpoints" / "step-3") == tree(stopped / "checkpoints" / "step-3")
    finished_run(config, f"output_dir={tmp_path}")
    assert_same_losses(tmp_path, finished)
    assert {"step-6", "step-8"} <= set(checkpoints(tmp_path))
    assert not [name for name in checkpoints(tmp_path) if "partial" in name]


@pytest.fixture(scope="module")
def stopped(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after step 4 and has the checkpoint of step 3."""
    folder = tmp_path_factory.mktemp("stopped")
    killed(config, f"output_dir={folder}", step=4)
    return folder


def _die_during_a_save(folder: Path, seconds: float) -> None:
    """Kill the process so many seconds after a checkpoint begins to be written, wherever it is then."""

    def watch() -> None:
        while not list(folder.glob("checkpoints/step-*.partial")):
            time.sleep(0.0005)
        time.sleep(seconds)
        _die()

    threading.Thread(target=watch, daemon=True).start()


def test_killed_at_random_moments_of_a_save(config: Path, finished: Path, tmp_path: Path) -> None:
    out = (f"output_dir={tmp_path}", "save_every_n_steps=1")
    delay = random.Random(0)
    for _ in range(4):
        outcome = run_recipe(config, *out, prepare=[partial(_die_during_a_save, tmp_path, delay.uniform(0, 0.1))])
        assert outcome.codes == [KILLED], outcome.outputs
    finished_run(config, *out)
    assert_same_losses(tmp_path, finished)


def _die_in_export(file: str) -> None:
    """Kill the process when it begins to write a file of the final output."""
    _die_instead(SafetensorsFile, "__init__", file)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "/.hf.partial/model.safetensors"])
def test_killed_export(config: Path, stopped: Path, tmp_path: Path, file: str) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    outcome = run_recipe(config, f"output_dir={tmp_path}", prepare=[partial(_die_in_export, file)])
    assert outcome.codes == [KILLED], outcome.outputs
    finished_run(config, f"output_dir={tmp_path}")
    assert {path.name.split(".")[0] for path in tmp_path.iterdir()} == {
        "adapter",
        "checkpoints",
        "events",
        "hf",
        "logs",
    }
