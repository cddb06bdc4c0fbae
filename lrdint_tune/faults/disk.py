"""A small file system that can be filled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lrdint_tune.faults.tools import run_tool

FILLER = ".filler"


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Mount a tmpfs of ``size`` bytes on ``folder``, which is made; needs root. What is in it is gone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    run_tool("mount", "-t", "tmpfs", "-o", f"size={size}", "faults", str(folder))
    try:
        yield
    finally:
        # Lazily: a process that is still dying may have a file open.
        run_tool("umount", "--lazy", str(folder))


def fill(folder: Path, leave: int) -> None:
    """Write a file until no more than ``leave`` bytes are free."""
    block = bytes(4096)
    with open(folder / FILLER, "wb", buffering=0) as file:
        try:
            while file.write(block) == len(block):
                pass
        except OSError:  # full
            pass
        file.truncate(max(0, file.tell() - leave))


def empty(folder: Path) -> None:
    """Remove that file."""
    (folder / FILLER).unlink(missing_ok=True)
