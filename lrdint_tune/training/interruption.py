"""Signals: the first one ends a run in order, the second at once."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from signal import Signals

from tqdm import tqdm

from lrdint_tune.exit_codes import INTERRUPTED, PREEMPTED

SIGNALS = (Signals.SIGTERM, Signals.SIGUSR1, Signals.SIGINT)
# A scheduler may signal the launcher, which forwards it, and its workers too: that is one request.
REPEAT_SECONDS = 1.0


class Stopped(Exception):
    """A signal asked for the end; raised on all ranks between two steps.

    Args:
        cause: the signal.
    """

    def __init__(self, cause: Signals) -> None:
        super().__init__(cause.name)
        self.cause = cause
        self.exit_code = _exit_code(cause)


class Interruption:
    """The signal that this process received, for the training loop to ask for.

    A thread receives them, since Python runs signal handlers in the main thread only, which may sit in a collective for
    minutes. Three ways to take a signal: until :meth:`defer` there is nothing to save and the first one ends the
    process; then the first is kept for the loop and the second ends the process; after :meth:`ignore` none has an
    effect.

    Without :meth:`install` there never is one.
    """

    def __init__(self) -> None:
        self.received: Signals | None = None
        self._received_at = 0.0
        self._deferred = False
        self._saying = ""
        self._lock = threading.Lock()

    def install(self, before_exit: Callable[[int], None] = lambda code: None) -> None:
        """Take SIGTERM, SIGUSR1 and SIGINT from now on. Call it in the main thread.

        Args:
            before_exit: called with the exit code before a signal ends the process, to tell the other ranks.
        """
        self._before_exit = before_exit
        receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        for number in SIGNALS:
            signal.signal(number, _do_nothing)
            signal.siginterrupt(number, False)  # system calls of C++ code go on
        signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_reset)
        threading.Thread(target=self._listen, args=(receiver,), name="signals", daemon=True).start()

    def defer(self, saying: str) -> None:
        """The first signal is kept from now on; ``saying`` tells the user what it leads to."""
        with self._lock:
            self._deferred, self._saying = True, saying

    def ignore(self) -> None:
        """What is to be done is done: torchrun's SIGTERM, sent when another rank has ended, changes nothing. Call it in
        the main thread."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def flags(self) -> list[float]:
        """A one for the signal received; the sums over the ranks go to :func:`stop_if_any`."""
        return [float(number is self.received) for number in SIGNALS]

    def _listen(self, receiver: socket.socket) -> None:
        while True:
            for number in receiver.recv(64):
                if number in SIGNALS:
                    self._take(Signals(number))

    def _take(self, cause: Signals) -> None:
        with self._lock:
            now, first = time.monotonic(), self.received is None
            if first:
                self.received, self._received_at = cause, now
            elif now - self._received_at < REPEAT_SECONDS:
                return
            deferred = self._deferred
        if first and deferred:
            _say(f"{cause.name}: {self._saying}; a second signal ends it at once")
        elif first:
            _say(f"{cause.name}: stopped before the first step, there is nothing to save")
            self._exit(_exit_code(cause))
        else:
            _say(f"{cause.name}: stopped at once; what was saved before stands")
            self._exit(128 + cause)

    def _exit(self, code: int) -> None:
        self._before_exit(code)
        os._exit(code)


def stop_if_any(sums: Sequence[float]) -> None:
    """Raise :class:`Stopped` when a rank received a signal: ``sums`` of all ranks' :meth:`Interruption.flags`."""
    for cause, count in zip(SIGNALS, sums, strict=True):
        if count:
            raise Stopped(cause)


def _exit_code(cause: Signals) -> int:
    return INTERRUPTED if cause is Signals.SIGINT else PREEMPTED


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(line, file=sys.stderr)  # above the progress bar
        sys.stderr.flush()


def _do_nothing(number: int, frame: object) -> None:
    """As a handler of Python's, it makes the interpreter write the number to the wake-up socket."""


def _hold() -> None:
    """While forking: a signal for the child must not come before it has let go of this process's socket."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _release() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _reset() -> None:
    """In a forked child: pools end their workers with SIGTERM, which must not count as one for this process."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    _release()
