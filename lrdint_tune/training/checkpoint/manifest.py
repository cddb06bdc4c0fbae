"""The manifest of a checkpoint: the JSON part of its state, and size and digest of every other file."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lrdint_tune.errors import ConfigError

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
        DamagedCheckpoint: it is missing, no JSON, or differs from what was written.
        ConfigError: the system cannot read it now, or another version of this package wrote it.
    """
    try:
        content = json.loads((folder / STATE_FILE).read_text())
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{STATE_FILE} is missing") from None
    except OSError as error:
        raise _unreadable(folder / STATE_FILE, error) from None
    except ValueError as error:
        raise DamagedCheckpoint(f"{STATE_FILE} is not readable ({error})") from None
    if isinstance(content, dict) and "digest" not in content and "step" in content:
        raise ConfigError(
            f"{folder}: written by a version of lrdint_tune without digests; go on with that version, or use another "
            "output_dir"
        )
    if not isinstance(content, dict) or content.pop("digest", None) != _digest_of_content(content):
        raise DamagedCheckpoint(f"{STATE_FILE}: its content differs from what was written")
    if content["format"] != _FORMAT:
        raise ConfigError(
            f"{folder}: of format {content['format']}, this version of lrdint_tune reads {_FORMAT}; go on with the "
            "version that wrote it, or use another output_dir"
        )
    return content


class Damage(NamedTuple):
    """What is wrong with a file of a checkpoint."""

    file: str
    what: str
    missing: bool = False


def damage(folder: Path, name: str, size: int, digest: str) -> Damage | None:
    """What is wrong with a file of a checkpoint, or None. Reads all of it, one block at a time.

    Raises:
        ConfigError: the system cannot read it now, which says nothing about what is in it.
    """
    file = folder / name
    try:
        found = file.stat().st_size
        if found != size:
            return Damage(name, f"{name} has {found:,} of {size:,} bytes")
        if digest_of(file) == digest:
            return None
        return Damage(name, f"{name}: its content differs from what was written")
    except FileNotFoundError:
        return Damage(name, f"{name} is missing", missing=True)
    except OSError as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{file}: cannot be read on {socket.gethostname()} ({error.strerror}); nothing was changed: see to the file "
        "system and start again"
    )


def _digest_of_content(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
