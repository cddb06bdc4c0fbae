"""Whether something listens at a host and port; in Python, so that it can be interrupted and fails in one line."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable


def listens(host: str, port: int) -> bool:
    """Whether a connection to ``host:port`` is accepted within five seconds."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def wait_for(host: str, port: int, seconds: float, waiting: Callable[[], None] | None = None) -> None:
    """Until something listens at ``host:port``; ``waiting`` is called once if it does not at first.

    Raises:
        ConnectionError: nothing did in ``seconds``; says what the last attempt met.
    """
    end = time.monotonic() + seconds
    while True:
        left = end - time.monotonic()
        try:
            socket.create_connection((host, port), timeout=min(5.0, max(0.1, left))).close()
            return
        except OSError as error:
            if left <= 0:
                raise ConnectionError(
                    f"cannot be reached from {socket.gethostname()}: {error.strerror or error}, for {seconds:.0f} s"
                ) from None
        if waiting is not None:
            waiting()
            waiting = None
        time.sleep(min(0.5, seconds / 10))
