"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def atomic_text(file: Path, content: str) -> None:
    """Write ``content`` to ``file`` in UTF-8; what was there stays if that fails.

    Raises:
        OSError: it cannot be written.
    """
    partial = file.with_suffix(".partial")
    try:
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Write a folder so that a reader, whenever the process dies, finds the old content or the new, never a mixture.

    Yields a fresh folder ``.<name>.partial`` beside ``path``. When the block ends without an exception it is flushed
    to disk and takes the place of ``path``; otherwise it is removed and ``path`` is untouched. What a killed process
    left of an earlier attempt is cleared up first. One process at a time may write to one path.
    """
    final = Path(path).resolve()  # a link to the folder stays a link
    partial = final.with_name(f".{final.name}.partial")
    final.parent.mkdir(parents=True, exist_ok=True)
    _put_back(final)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        replace_folder(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(new: Path, final: Path) -> None:
    """Flush the folder ``new`` and give it the name ``final``, in place of a folder of that name, if there is one.

    Both lie on the same file system.

    Where the file system can exchange two names, there is no moment without a complete ``final``. Where it cannot
    (some network file systems) there is one, between two renames: a process killed just then leaves the old folder
    under ``.<name>.previous``, and the next :func:`atomic_folder` puts it back.
    """
    for folder, _, names in os.walk(new):
        for name in names:
            flush(Path(folder, name))
        flush(Path(folder))
    if not final.exists():
        os.replace(new, final)
    elif _exchange(new, final):
        shutil.rmtree(new)
    else:
        previous = _previous(final)
        os.replace(final, previous)
        os.replace(new, final)
        shutil.rmtree(previous)
    flush(final.parent)


def _previous(final: Path) -> Path:
    return final.with_name(f".{final.name}.previous")


def _put_back(final: Path) -> None:
    """Undo what a process that died between two renames left."""
    previous = _previous(final)
    if previous.exists() and not final.exists():
        os.replace(previous, final)
    shutil.rmtree(previous, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)


def flush(path: Path) -> None:
    """Have the content of a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
