"""Files that vanish or shrink under a memory map: an error that names them, before anything is read."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lrdint_tune.errors import ConfigError, DataLostError
from lrdint_tune.training.data import BatchLoader, TokenisedDataset
from lrdint_tune.training.data.watch import WatchedFiles
from tests.distributed.harness import run_ranks

ROWS = [("prompt", f"response {i}") for i in range(2000)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data.arrow"
    path.write_bytes(b"x" * 1000)
    return path


def test_nothing_happened(file: Path) -> None:
    watched = WatchedFiles([str(file)])
    watched.check()
    file.write_bytes(b"y" * 2000)  # grown
    watched.check()


def test_removed(file: Path) -> None:
    watched = WatchedFiles([str(file)])
    file.unlink()
    with pytest.raises(DataLostError, match=r"data.arrow: No such file or directory, while the run reads it;"):
        watched.check()


def test_folder_removed(tmp_path: Path, file: Path) -> None:
    watched = WatchedFiles([str(file)])
    tmp_path.rename(tmp_path.with_name("elsewhere"))
    with pytest.raises(DataLostError, match="No such file"):
        watched.check()


def test_truncated(file: Path) -> None:
    watched = WatchedFiles([str(file)])
    os.truncate(file, 10)
    with pytest.raises(DataLostError, match=r"data.arrow: has 10 of 1000 bytes, while the run reads it; remove"):
        watched.check()


def test_replaced(file: Path) -> None:
    """By another run that tokenises the same rows: the map stays that of the old file."""
    watched = WatchedFiles([str(file)])
    file.with_suffix(".new").write_bytes(b"z")
    file.with_suffix(".new").rename(file)
    watched.check()


def test_truncated_and_replaced(file: Path) -> None:
    watched = WatchedFiles([str(file)])
    os.truncate(file, 10)
    file.unlink()
    file.write_bytes(b"z" * 1000)
    with pytest.raises(DataLostError, match="has 10 of 1000 bytes"):
        watched.check()


def test_gone_before(tmp_path: Path) -> None:
    with pytest.raises(DataLostError, match="No such file"):
        WatchedFiles([str(tmp_path / "none")])


def test_nothing_stays_open(file: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    watched = WatchedFiles([str(file)] * 3)
    assert len(os.listdir("/proc/self/fd")) == before + 3
    del watched
    assert len(os.listdir("/proc/self/fd")) == before


def loader(data: TokenisedDataset) -> BatchLoader:
    return BatchLoader(
        data, batch_size=4, dp_rank=0, dp_size=1, max_seq_len=64, packed=True, shuffle=True, seed=0, pad_id=0
    )


def arrow_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("cache-*.arrow"))


@pytest.mark.parametrize("num_proc", [None, 2])
def test_loader(build: Any, caches: Path, num_proc: int | None) -> None:
    """Of the position that was to be read nothing is lost."""
    batches = loader(build(ROWS, num_proc=num_proc))
    batches.next_batch()
    files = arrow_files(caches)
    assert len(files) == (num_proc or 1)
    whole = files[-1].read_bytes()
    os.truncate(files[-1], 4096)
    for _ in range(2):
        with pytest.raises(DataLostError, match=rf"{files[-1].name}: has 4096 of {len(whole)} bytes"):
            batches.next_batch()
    with pytest.raises(DataLostError):
        next(batches.epoch_batches())
    assert batches.position == 4


def test_without_the_look_it_would_be_a_signal(tmp_path: Path) -> None:
    """What the check is there for."""
    program = """
import datasets, os, sys
table = datasets.Dataset.from_dict({"a": list(range(300_000))})
table.save_to_disk(sys.argv[1])
table = datasets.load_from_disk(sys.argv[1])
values = table.data.column("a").chunks[0].to_numpy()
os.truncate(table.cache_files[0]["filename"], 4096)
print(values[-1])
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "saved")], capture_output=True, timeout=120)
    assert done.returncode < 0  # SIGBUS


@pytest.mark.parametrize("which", ["cache-*.arrow", "generator-*.arrow"])
@pytest.mark.parametrize("size", [0, 100, 4096])
def test_damaged_caches_are_named(build: Any, caches: Path, which: str, size: int) -> None:
    """The next start neither trains on half of it nor ends in a traceback; without the folder it is made again."""
    whole = build(ROWS).digest
    (damaged,) = caches.rglob(which)
    os.truncate(damaged, size)
    with pytest.raises(ConfigError) as error:
        build(ROWS)
    message = str(error.value)
    assert message.startswith("dataset.cache_dir='") and "is damaged (" in message and "\n" not in message
    damaged.unlink()
    if which.startswith("generator"):  # its folder is taken for complete
        for file in damaged.parent.iterdir():
            file.unlink()
        damaged.parent.rmdir()
    assert build(ROWS).digest == whole


def _together(lost_rank: int) -> str:
    import torch
    import torch.distributed as dist

    from lrdint_tune.training.data import together

    def batches() -> Any:
        yield "first"
        if dist.get_rank() == lost_rank:
            raise DataLostError("a file")
        yield "second"

    seen = []
    try:
        for batch in together(batches(), torch.device("cpu")):
            seen.append(batch)
    except DataLostError as error:
        return f"{seen} {error}"
    return str(seen)


def test_together() -> None:
    for result in run_ranks(_together, 3, 1):
        assert result.startswith("['first'] a file (rank 1, host ")
    assert run_ranks(_together, 2, 5) == ["['first', 'second']"] * 2
