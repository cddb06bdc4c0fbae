"""The harness disturbs real runs and finds them as they should be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FAULTS = ["SIGTERM", "kill -9 inside a save", "bit-flipped shard"]
TWO_HOSTS = "link between two hosts cut"


@pytest.mark.slow
def test_three_faults(tmp_path: Path) -> None:
    faults = [*FAULTS[1:], TWO_HOSTS] if os.geteuid() == 0 else FAULTS
    only = [argument for fault in faults for argument in ("--only", fault)]
    done = subprocess.run(
        [sys.executable, "-m", "lrdint_tune.faults", "--output_dir", str(tmp_path / "faults"), "--num_faults=3", *only],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "faults" / "faults.json").read_text())
    assert sorted(fault["fault"] for fault in written["faults"]) == sorted(faults)
    assert all(fault["difference"] <= 1e-6 and not fault["problems"] for fault in written["faults"])
