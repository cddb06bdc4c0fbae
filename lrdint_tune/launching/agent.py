"""torchrun's agent, which starts the ranks of one node and watches them, with exit codes that mean something.

torch's own agent restarts workers whatever they ended with, gives a second signal no second meaning, and loses the
codes of workers that a signal stopped.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import groupby
from types import FrameType

from torch.distributed.elastic.agent.server import WorkerGroup
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing import api as multiprocessing_api
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError

from lrdint_tune.exit_codes import BAD_INPUT, DATA_LOST, INTERRUPTED, NONFINITE, PREEMPTED
from lrdint_tune.training.interruption import REPEAT_SECONDS

log = logging.getLogger(__name__)

# Started again on the same machines, the same thing would happen again, or a scheduler is to decide.
FINAL = frozenset({BAD_INPUT, NONFINITE, DATA_LOST, PREEMPTED, INTERRUPTED})
# After the second signal the workers end at once by themselves; what then still lives is killed.
SECOND_SIGNAL_SECONDS = 5
# When another node has given up: for these workers to notice and say what they lost, before they are told to stop.
CLOSED_SECONDS = 60


class Agent(LocalElasticAgent):
    """The workers of one node.

    Attributes:
        cause: (rank, exit code) of the worker whose end was the first to be seen, in the latest attempt that failed.
        stopped: rank -> exit code of the workers that this agent had to stop, after a signal or with another node lost.
        forced: the second signal, if there was one.
    """

    cause: tuple[int, int] | None = None
    closed_since: float | None = None
    stopped: Mapping[int, int] = {}
    forced: signal.Signals | None = None
    _noticed: object = None  # the attempt whose end was seen

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        # Before torch looks: as soon as it sees one failure it ends the others, and mixes their codes in.
        ended = {rank: code for rank, code in self._codes().items() if code}
        result = super()._monitor_workers(worker_group)
        if result.state != WorkerState.HEALTHY:
            self._noticed = self._pcontext
        if result.is_failed():
            failures = {rank: failure.exitcode for rank, failure in result.failures.items()}
            self.cause = root_cause(ended or dict([next(iter(failures.items()))]))
            if self.cause[1] in FINAL:
                self._remaining_restarts = 0
            for line in describe(failures, by_themselves=ended or failures):
                say(line)
            if self._remaining_restarts:
                say(f"the workers are started again (restarts left: {self._remaining_restarts - 1})")
        elif result.state == WorkerState.HEALTHY and self._rdzv_handler.is_closed():
            # torch would go on for as long as the workers do not notice.
            self.closed_since = self.closed_since or time.monotonic()
            if time.monotonic() - self.closed_since > CLOSED_SECONDS:
                raise RendezvousClosedError("a node whose workers failed has closed the job")
        return result

    def unnoticed_failures(self) -> dict[int, int]:
        """Rank -> exit code, once all workers have ended, one of them has failed, and this agent did not see it yet."""
        if self._pcontext is self._noticed:
            return {}
        codes = {rank: code for rank, code in self._codes().items() if code is not None}
        return codes if len(codes) == len(self._worker_group.workers) and any(codes.values()) else {}

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int | None = None) -> None:
        self._noticed = self._pcontext
        alive = [rank for rank, code in self._codes().items() if code is None]
        patience = self._shutdown_timeout if timeout is None else timeout
        if alive:
            say(f"{death_sig.name} goes to rank{plural(alive)}; at most {patience} s to save")
        try:
            super()._shutdown(death_sig, patience)
        except SignalException as second:
            self.forced = second.sigval
            ignore_signals()  # what follows takes seconds
            self._end_at_once(second.sigval)
            raise
        finally:
            if alive:
                self.stopped = {
                    rank: code for rank, code in self._codes().items() if rank in alive and code is not None
                }

    def _end_at_once(self, second: signal.Signals) -> None:
        assert isinstance(self._pcontext, SubprocessContext)  # there were workers to shut down
        handlers = self._pcontext.subprocess_handlers.values()
        end = time.monotonic() + SECOND_SIGNAL_SECONDS
        told = -math.inf
        while time.monotonic() < end and any(handler.proc.poll() is None for handler in handlers):
            # Again after a while: a worker that got the first one late takes this one for its repetition.
            if time.monotonic() - told > REPEAT_SECONDS:
                told = time.monotonic()
                for handler in handlers:
                    if handler.proc.poll() is None:
                        handler.close(second)
            time.sleep(0.02)
        super()._shutdown(signal.SIGKILL, SECOND_SIGNAL_SECONDS)

    def _codes(self) -> dict[int, int | None]:
        """Exit codes by rank, as :mod:`subprocess` gives them: negative for a signal, None for a living worker."""
        if not isinstance(self._pcontext, SubprocessContext):
            return {}
        workers = self._worker_group.workers
        return {
            workers[local_rank].global_rank: handler.proc.poll()
            for local_rank, handler in self._pcontext.subprocess_handlers.items()
        }


def root_cause(codes: Mapping[int, int]) -> tuple[int, int]:
    """Which of several workers that ended within a moment to believe: (rank, exit code).

    One killed by a signal did not choose to end; a code with a meaning says more than a crash, which may come of
    losing the other one.
    """
    return min(codes.items(), key=lambda item: (item[1] >= 0, item[1] in (0, 1), item[0]))


def shell_code(code: int) -> int:
    """A worker's exit code as a shell gives it: 128 + n for signal n."""
    return 128 - code if code < 0 else code


def describe(codes: Mapping[int, int], by_themselves: Iterable[int]) -> list[str]:
    """One line for the ranks of this host that ended alike.

    Args:
        codes: rank -> exit code; zeros are left out.
        by_themselves: the ranks that the agent did not stop.
    """

    def how(rank: int) -> str:
        code = codes[rank]
        if rank not in own:
            return "stopped, because of the others" if code < 0 else f"exit code {code}, after the others"
        return f"killed by {signal_name(-code)}" if code < 0 else f"exit code {code}"

    own = set(by_themselves)
    # Those that began it first.
    ranks = sorted((rank for rank in codes if codes[rank]), key=lambda rank: (rank not in own, codes[rank], rank))
    return [f"rank{plural(list(same))} on {socket.gethostname()}: {text}" for text, same in groupby(ranks, key=how)]


def plural(ranks: list[int]) -> str:
    """``" 3"``, ``"s 0-7"`` or ``"s 1, 4, 5"``: what follows the word rank."""
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"s {ranks[0]}-{ranks[-1]}"
    return f"{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def take_signals(numbers: Iterable[signal.Signals]) -> None:
    """Raise torch's :class:`SignalException` at a signal; not at what follows within :data:`REPEAT_SECONDS`.

    The workers count such a repetition as the same request too.
    """
    taken = -math.inf

    def take(signum: int, frame: FrameType | None) -> None:
        nonlocal taken
        now = time.monotonic()
        if now - taken >= REPEAT_SECONDS:
            taken = now
            raise SignalException(f"signal {signum}", sigval=signal.Signals(signum))

    for number in numbers:
        signal.signal(number, take)
    # What torch installs each time it starts workers; its own takes every signal for a new one.
    assert callable(multiprocessing_api._terminate_process_handler)
    multiprocessing_api._terminate_process_handler = take


def ignore_signals() -> None:
    """From now on nothing but SIGKILL interrupts this process."""
    for handled in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(handled, signal.SIG_IGN)


def say(line: str) -> None:
    """Tell the user, if there is one: Ctrl-C ends a ``| tee`` too, and the workers must be told all the same."""
    with suppress(OSError):
        os.write(2, f"launch: {line}\n".encode())  # a buffer would fail again at the exit, and change its code
