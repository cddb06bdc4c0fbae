"""The harness disturbs real runs and finds them as they should be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lrdint_tune.faults.faults import FlipBit, Terminate

REPOSITORY = Path(__file__).parents[2]
FAULTS = [FlipBit.name, Terminate.name]  # quick ones, possible everywhere


@pytest.mark.slow
def test_two_faults(tmp_path: Path) -> None:
    only = [argument for fault in FAULTS for argument in ("--only", fault)]
    options = ["--num_faults=2", "--train_timeout_seconds=5", "max_steps_per_epoch=6", *only]
    done = subprocess.run(
        [sys.executable, "-m", "lrdint_tune.faults", "--output_dir", str(tmp_path / "faults"), *options],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "faults" / "faults.json").read_text())
    assert sorted(fault["fault"] for fault in written["faults"]) == sorted(FAULTS)
    assert all(fault["difference"] <= 1e-6 and not fault["problems"] for fault in written["faults"])
