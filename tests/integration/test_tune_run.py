"""The commands as a user types them: torchtune runs the module in its own process, whose ``__main__`` is another."""

import subprocess
import sys
from pathlib import Path

import pytest

from lrdint_tune.exit_codes import BAD_INPUT
from tests.integration.kill_ranks import REPOSITORY

TUNE = Path(sys.executable).with_name("tune")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "config", "overrides"),
    [
        ("evaluate", "evaluate", ["model=/nowhere", "output_dir=out"]),
        ("report", "report", ["run=/nowhere"]),
        ("consolidate", "consolidate", ["checkpoint=/nowhere", "output_dir=out"]),
        ("full_finetune_distributed", "quickstart", ["checkpointer.checkpoint_dir=/nowhere", "output_dir=out"]),
    ],
)
def test_a_wrong_path_is_named_in_one_line(command: str, config: str, overrides: list[str], tmp_path: Path) -> None:
    arguments = ["run", f"lrdint_tune/{command}", "--config", REPOSITORY / f"configs/{config}.yaml", *overrides]
    done = subprocess.run([sys.executable, TUNE, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == BAD_INPUT, done.stderr
    assert "/nowhere" in done.stderr and "Traceback" not in done.stderr
