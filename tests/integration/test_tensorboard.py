"""TensorBoard in a browser, as a user opens it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lrdint_tune.training.metrics import TensorBoardLogger

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_pictures_of_tabs(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path / "runs" / "a"))
    logger.open(resumed_step=0)
    logger.log_text("config", "# a title\n\n" + "many words " * 200)
    logger.close()
    command = [sys.executable, "-m", "benchmarks.tensorboard_screenshots", "--logdir", tmp_path / "runs"]
    done = subprocess.run(
        [*command, "--out", tmp_path, "--tabs", "text"], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "tensorboard_text.png") as picture:
        assert picture.size == (1500, 800)
        # The text's pixels: below the bar, right of the list of runs.
        colours = picture.convert("L").crop((400, 200, 1450, 800)).getcolors(maxcolors=256)
    dark = sum(count for count, value in colours if value < 100)
    assert dark > 5000
