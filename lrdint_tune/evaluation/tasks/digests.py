"""Digests of the local files behind an option: a path, a pattern, a folder, a list of these, or a mapping of splits."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrdint_tune.training.checkpoint.manifest import digest_of


def local_digests(value: Any) -> Any:
    """JSON values that differ where the files' content does, wherever the files are; None where there is any part
    without a local file (a name on the hub, an address, null).

    Args:
        value: as given. Files of a pattern are taken in the order of their names, those of a folder with their names.

    Raises:
        OSError: a file cannot be read.
    """
    if isinstance(value, Mapping):
        parts = {str(key): local_digests(part) for key, part in value.items()}
        return parts if parts and all(part is not None for part in parts.values()) else None
    if isinstance(value, list):
        found = [local_digests(part) for part in value]
        return found if found and all(part is not None for part in found) else None
    if not isinstance(value, str):
        return None
    path = Path(value).expanduser()
    if path.is_file():
        return digest_of(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return {str(file.relative_to(path)): digest_of(file) for file in files} or None
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    return [digest_of(match) for match in matches if match.is_file()] or None
