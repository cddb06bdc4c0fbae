"""Finding the processes of a run in ``/proc``, so Linux only."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path


def with_variable(name: str, value: str) -> dict[int, dict[str, str]]:
    """Process id -> environment of every living process that was started with ``name=value``, zombies excluded.

    A launcher's workers have sessions of their own and outlive it, so neither groups nor parents find them all.
    """
    found = {}
    for pid in _all():
        variables = _environment(pid)
        if variables.get(name) == value:
            found[pid] = variables
    return found


def ranks_of(*launchers: int) -> dict[int, int]:
    """Rank -> process id of the launchers' children."""
    ranks = {}
    for pid in _all():
        if _parent(pid) in launchers:
            rank = _environment(pid).get("RANK")
            if rank is not None:
                ranks[int(rank)] = pid
    return ranks


def mapped(pid: int, suffix: str) -> list[Path]:
    """The files whose names end so and that the process has mapped into its memory."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if line.endswith(suffix)}
    return [Path(path) for path in sorted(paths)]


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Signal each process that is still there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def _all() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it ended meanwhile
        return None


def _environment(pid: int) -> dict[str, str]:
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(entry.decode(errors="replace").partition("=")[::2] for entry in entries if entry)
