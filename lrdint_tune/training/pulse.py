"""What the main thread of a rank is doing, for the threads that watch it."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

# How deep below a collective's Python function its wait may sit.
_WAITING_DEPTH = 4


class Pulse:
    """Written by the main thread, read by the threads of :class:`~lrdint_tune.training.heartbeat.Heartbeat`.

    Attributes:
        phase, step: what is being done, for messages.
        marks: how far the main thread has come; the same number at the same place on every rank.
        watched: whether a rank that makes no mark for long hangs. Not in set-up, saving and export, which may take any
            time, and not when a phase is met first: that is when code is compiled and connections are made.
    """

    def __init__(self) -> None:
        self.phase, self.step, self.marks, self.watched = "set-up", 0, 0, False
        self._met: set[str] = set()

    def enter(self, phase: str, step: int, *, watch: bool = False) -> None:
        """Begin something, ``step`` being the optimizer step made or being made."""
        self.watched = watch and phase in self._met
        self._met.add(phase)
        self.phase, self.step = phase, step
        self.mark()

    def mark(self) -> None:
        """One more piece is done. Every rank must make the same marks."""
        self.marks += 1


def agreed(tensor: Tensor) -> Any:
    """``tensor.tolist()``, for what a collective made: who watches this thread sees that it waits for others.

    With NCCL the collective's own call returns at once, and the host waits where it first reads the result.
    """
    return tensor.tolist()


@dataclass(frozen=True)
class Whereabouts:
    """Where a thread is: the innermost line of this project (or else function), and whether it is in a collective or
    waits for the result of one."""

    line: str
    waiting: bool


def main_thread() -> Whereabouts:
    """Where the main thread is now."""
    ident = threading.main_thread().ident
    assert ident is not None
    frame: FrameType | None = sys._current_frames()[ident]
    innermost, depth, waiting, line = frame, 0, False, ""
    while frame is not None:
        file, reading = frame.f_code.co_filename, frame.f_code is agreed.__code__
        waiting |= reading or (depth < _WAITING_DEPTH and "torch/distributed/" in file)
        if not line and not reading and "lrdint_tune/" in file:
            line = f"{Path(file).name}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame, depth = frame.f_back, depth + 1
    assert innermost is not None
    return Whereabouts(line or innermost.f_code.co_name, waiting)
