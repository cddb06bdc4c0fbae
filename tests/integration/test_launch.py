"""The ways to start a run, as a user types them: real launchers, real processes."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.common.tiny_run import read_losses, write_run
from tests.integration.kill_ranks import REPOSITORY, TINY, environment, run_uninterrupted, run_with_kills, torchrun
from tests.integration.runs import assert_same_losses

pytestmark = pytest.mark.slow

TUNE = str(Path(sys.executable).with_name("tune"))
RECIPE = "lrdint_tune/full_finetune_distributed"


@pytest.mark.parametrize(
    "command",
    [
        pytest.param([TUNE, "run", RECIPE], id="tune run"),
        pytest.param([TUNE, "run", "--nproc_per_node", "2", RECIPE], id="tune run, two processes"),
        pytest.param(torchrun(), id="torchrun -m, two processes"),
        pytest.param([sys.executable, "-m", RECIPE.replace("/", ".")], id="python -m"),
    ],
)
def test_same_losses(config: Path, finished: Path, tmp_path: Path, command: list[str]) -> None:
    given = ["--config", str(config), f"output_dir={tmp_path}"]
    done = subprocess.run([*command, *given], env=environment(), cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_losses(tmp_path, finished)
    assert (tmp_path / "hf" / "model.safetensors").is_file()


@pytest.mark.parametrize("command", [[TUNE, "run", RECIPE], torchrun(processes=1)], ids=["tune run", "torchrun"])
def test_bad_input_exits_with_one_line(config: Path, tmp_path: Path, command: list[str]) -> None:
    given = ["--config", str(config), f"output_dir={tmp_path}", "dtype=fp16"]
    done = subprocess.run([*command, *given], env=environment(), cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count("error: dtype='fp16'") == 1


def test_five_kills_under_torchrun(tmp_path: Path) -> None:
    config = write_run(tmp_path, **TINY)
    expected = run_uninterrupted(config, tmp_path / "whole", [])
    kills = run_with_kills(config, tmp_path / "killed", [], steps=len(expected), kills=5, seed=0)
    assert len(kills) == 5
    assert_same_losses(tmp_path / "killed", expected)
    assert read_losses(tmp_path / "killed").keys() == set(range(1, 25))
