"""How a process says what was wrong, and ends when others may hang."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from lrdint_tune.errors import ReportedError

_HEAD_START_SECONDS = 1.0


def is_main() -> bool:
    """True in the first process, by what the launcher says; before there is a process group."""
    return os.environ.get("RANK", "0") == "0"


def tells() -> bool:
    """Whether :func:`report` says anything in this process: in rank 0, for everybody, and for what is wrong on another
    machine only (a missing file) in its first process."""
    return is_main() or os.environ.get("LOCAL_RANK") == "0"


def report(error: ReportedError) -> None:
    """Say ``error: ...``, once for all processes that met it."""
    if tells():
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        # torchrun ends the others as soon as one process has failed: the one that tells comes first.
        time.sleep(_HEAD_START_SECONDS)


def end_now(code: int) -> NoReturn:
    """End this process as it is. The interpreter's own end waits for threads, such as that of a save that hangs, and
    for collectives that other ranks will never join."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads them any more
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def in_time(seconds: float, error: ReportedError) -> Iterator[None]:
    """End the process with ``error`` when the body takes longer, also if it is inside C++ for ever."""

    def give_up() -> None:
        report(error)
        end_now(error.exit_code)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
