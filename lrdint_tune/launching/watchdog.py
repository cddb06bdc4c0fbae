"""Ends an agent that waits for an answer of the nodes' store which never comes: the link to it is cut.

torch (2.13) asks the store between two looks at its workers. Its timeout sends another message and waits for the answer
to that without one, until the operating system gives the connection up after a quarter of an hour; and a thread inside
C++ takes no signals.
"""

from __future__ import annotations

import os
import sys
import threading
import time

from lrdint_tune.launching.agent import Agent, describe, root_cause, say, shell_code

STUCK_SECONDS = 10.0  # between the end of the last worker and the agent's notice, which takes a tenth of one otherwise
_LOOK_SECONDS = 1.0


def start_watchdog(agent: Agent, endpoint: str) -> None:
    """End the process, with the code and the lines of workers that failed, if ``agent`` takes no notice of them.

    Args:
        endpoint: where the store is.
    """
    threading.Thread(target=_watch, args=(agent, endpoint), name="watchdog", daemon=True).start()


def _watch(agent: Agent, endpoint: str) -> None:
    since: float | None = None
    while True:
        time.sleep(_LOOK_SECONDS)
        codes = agent.unnoticed_failures()
        if not codes:
            since = None
            continue
        since = since or time.monotonic()
        if time.monotonic() - since > STUCK_SECONDS:
            for line in describe(codes, by_themselves=codes):
                say(line)
            print(f"error: the other nodes cannot be reached at {endpoint} any more", file=sys.stderr, flush=True)
            os._exit(shell_code(root_cause(codes)[1]))
