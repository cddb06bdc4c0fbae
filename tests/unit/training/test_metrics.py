"""Records that can be continued, and that wait while the disk is full."""

import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lrdint_tune.errors import ConfigError
from lrdint_tune.training.metrics import TensorBoardLogger, append


def recorded(folder: Path) -> list[tuple[int, float]]:
    return [(e.step, e.value) for e in EventAccumulator(str(folder)).Reload().Scalars("loss")]


def write(folder: Path, resumed_step: int, steps: range, value: float) -> TensorBoardLogger:
    logger = TensorBoardLogger(str(folder))
    logger.open(resumed_step=resumed_step)
    for step in steps:
        logger.log({"loss": value}, step)
    logger.close()
    return logger


def test_resumed_record_is_one_curve(tmp_path: Path) -> None:
    write(tmp_path, 0, range(0, 6), 1.0)
    logger = write(tmp_path, 3, range(4, 8), 2.0)
    expected = [(step, 1.0 if step <= 3 else 2.0) for step in range(8)]
    assert recorded(tmp_path) == expected
    assert logger.history("loss") == expected
    assert logger.history("other") == []


def test_new_run_hides_the_earlier_one(tmp_path: Path) -> None:
    write(tmp_path, 0, range(0, 6), 1.0)
    logger = write(tmp_path, 0, range(0, 2), 2.0)
    assert recorded(tmp_path) == logger.history("loss") == [(0, 2.0), (1, 2.0)]


def test_half_a_line_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 4), 1.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    logger = write(tmp_path, 3, range(4, 5), 2.0)
    assert logger.history("loss") == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def test_each_line_is_json(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 3), 0.1)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.1}]


def test_text_is_shown(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path))
    logger.open(resumed_step=0)
    logger.log_text("config", "a: 1")
    logger.close()
    assert "config/text_summary" in EventAccumulator(str(tmp_path)).Reload().Tags()["tensors"]


def test_no_number_is_a_gap(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path))
    logger.open(resumed_step=0)
    for step, value in enumerate([1.0, math.nan, math.inf, 2.0]):
        logger.log({"loss": value}, step)
    logger.close()
    assert recorded(tmp_path) == logger.history("loss") == [(0, 1.0), (3, 2.0)]


# ---------------------------------------------------------------- a full disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    """Take all the room there is, to the last byte."""
    file = folder / "filler"
    with open(file, "ab", buffering=0) as target:
        with pytest.raises(OSError, match="No space left"):
            while True:
                target.write(b"x" * 4096)
    return file


def whole_lines(folder: Path) -> list[int]:
    text = (folder / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line)["step"] for line in text.splitlines()]


def test_full_disk(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing raises, the files stay readable, and with room again everything is there, in both."""
    logs = disk / "logs"
    logger = TensorBoardLogger(str(logs))
    logger.open(resumed_step=0)
    logger.log({"loss": 0.0}, 0)
    filler = fill(disk)
    for step in range(1, 400):  # more than what is left of the files' last pages
        logger.log({"loss": float(step)}, step)
    assert caplog.text.count("cannot be written (No space left on device)") == 1
    written = whole_lines(logs)
    assert written == list(range(len(written))) and len(written) < 400
    assert recorded(logs) == [(step, float(step)) for step in range(len(recorded(logs)))]
    everything = [(step, float(step)) for step in range(401)]
    assert logger.history("loss") == everything[:-1]
    filler.unlink()
    logger.log({"loss": 400.0}, 400)
    logger.close()
    assert caplog.text.count("is written again, nothing is missing") == 1
    assert whole_lines(logs) == list(range(401))
    assert recorded(logs) == logger.history("loss") == everything


def test_full_from_the_beginning(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A resumed run keeps the record of the earlier one until it can write."""
    logs = disk / "logs"
    write(logs, 0, range(0, 6), 1.0)
    filler = fill(disk)
    logger = TensorBoardLogger(str(logs))
    logger.open(resumed_step=3)
    logger.log({"loss": 2.0}, 4)
    assert whole_lines(logs) == list(range(6))
    filler.unlink()
    logger.log({"loss": 2.0}, 5)
    logger.close()
    expected = [(step, 1.0 if step <= 3 else 2.0) for step in range(6)]
    assert recorded(logs) == logger.history("loss") == expected
    assert sorted(path.name.split(".")[0] for path in logs.iterdir()) == ["events", "events", "metrics"]


def test_new_run_on_a_full_disk(disk: Path) -> None:
    """It takes the place of the earlier one, once it can write."""
    write(disk / "logs", 0, range(0, 6), 1.0)
    filler = fill(disk)
    logger = TensorBoardLogger(str(disk / "logs"))
    logger.open(resumed_step=0)
    logger.log({"loss": 2.0}, 0)
    filler.unlink()
    logger.log_images({"map": np.zeros((8, 8, 3), np.uint8)}, 1)
    logger.log_histograms({"entropy": torch.ones(3)}, 1)
    logger.close()
    assert recorded(disk / "logs") == logger.history("loss") == [(0, 2.0)]
    tags = EventAccumulator(str(disk / "logs")).Reload().Tags()
    assert (tags["images"], tags["histograms"]) == (["map"], ["entropy"])


def test_full_to_the_end(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = TensorBoardLogger(str(disk / "logs"))
    fill(disk)
    logger.open(resumed_step=0)
    for step in range(3):
        logger.log({"loss": 1.0}, step)
    logger.close()
    assert "the last values were not written" in caplog.text
    assert logger.history("loss") == [(0, 1.0), (1, 1.0), (2, 1.0)]


def test_append_is_all_or_nothing(disk: Path) -> None:
    file = disk / "file"
    append(file, b"first")
    with pytest.raises(OSError, match="No space left"):
        append(file, b"x" * 70_000)
    assert file.read_bytes() == b"first"
    append(file, b" second")
    assert file.read_bytes() == b"first second"


def test_log_dir_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "logs"):
        with pytest.raises(ConfigError, match=r"metric_logger.log_dir='.*': .*file is no folder; choose another"):
            TensorBoardLogger(str(path)).check()
        with pytest.raises(ConfigError, match=r"metric_logger.events_dir='.*': .*; choose another events_dir"):
            TensorBoardLogger(str(tmp_path / "logs"), str(path)).check()
    TensorBoardLogger(str(tmp_path / "new" / "logs")).check()
    assert not (tmp_path / "new").exists()
