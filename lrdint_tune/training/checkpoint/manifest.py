"""The manifest of a checkpoint: the JSON part of its state, and size and digest of every other file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STATE_FILE = "train_state.json"
_FORMAT = 2
_BLOCK = 1 << 20


class DamagedCheckpoint(Exception):
    """A file of a checkpoint is not as it was written; the message names the file and what is wrong with it."""


def digest_of(file: Path) -> str:
    """blake2b of a file's content, hexadecimal, read in blocks of 1 MiB.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path, train_state: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Write ``train_state.json`` into ``folder`` and flush it to the disk.

    Args:
        train_state: what JSON can hold.
        digests: name -> :func:`digest_of` for every other file of the checkpoint.
    """
    files = {name: [(folder / name).stat().st_size, digest] for name, digest in sorted(digests.items())}
    content = {"format": _FORMAT, **train_state, "files": files}
    with open(folder / STATE_FILE, "w") as stream:
        json.dump({**content, "digest": _digest_of_content(content)}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """What :func:`write_manifest` was given, with ``format`` and ``files`` (name -> [bytes, digest]).

    Raises:
        DamagedCheckpoint: it is missing or unreadable, or differs from what was written.
    """
    try:
        content = json.loads((folder / STATE_FILE).read_text())
        written = content.pop("digest")
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{STATE_FILE} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{STATE_FILE} is not readable ({error})") from None
    if not isinstance(content, dict) or written != _digest_of_content(content):
        raise DamagedCheckpoint(f"{STATE_FILE}: its content differs from what was written")
    return content


def damage(folder: Path, name: str, size: int, digest: str) -> str | None:
    """What is wrong with a file of a checkpoint, or None. Reads all of it, one block at a time."""
    file = folder / name
    try:
        found = file.stat().st_size
        if found != size:
            return f"{name} has {found:,} of {size:,} bytes"
        return None if digest_of(file) == digest else f"{name}: its content differs from what was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def _digest_of_content(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
