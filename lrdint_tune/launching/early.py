"""Signals before there are workers. Does not import torch: it is for the seconds in which torch is imported."""

from __future__ import annotations

import os
import signal
from signal import Signals

from lrdint_tune.exit_codes import INTERRUPTED, PREEMPTED

# Exit codes with nothing to save.
CODES = {Signals.SIGTERM: PREEMPTED, Signals.SIGUSR1: PREEMPTED, Signals.SIGINT: INTERRUPTED}


def end_at_signals() -> dict[Signals, signal._HANDLER]:
    """End the process in order at the signals of ``CODES`` from now on; returns what they did before."""
    return {number: signal.signal(number, _end) for number in CODES}


def nothing_to_save(number: Signals) -> str:
    return f"{number.name} before there were workers: nothing to save"


def _end(number: int, frame: object) -> None:
    # Not with an exception: modules in the middle of being imported catch some of them.
    os.write(2, f"launch: {nothing_to_save(Signals(number))}\n".encode())
    os._exit(CODES[Signals(number)])
