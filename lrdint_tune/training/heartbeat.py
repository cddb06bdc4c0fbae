"""Ranks that die, freeze, hang or are cut off end the job in time, by name.

Collectives wait for a lost rank for half an hour, or for ever. So every rank writes a beat into the process group's
store every second; rank 0 reads all of them, the others rank 0's. Who finds a rank missing leaves a verdict in the
store and ends; everybody who reads it ends too.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lrdint_tune.errors import UnreachableError
from lrdint_tune.exit_codes import LOST_RANK
from lrdint_tune.training.pulse import Pulse, main_thread
from lrdint_tune.training.rendezvous import store_address

BEAT_SECONDS = 1.0  # at most; a tenth of the timeout if that is less
_HURRY_BEATS = 4
_AGAIN = "; the same command goes on from the last checkpoint"


@dataclass(frozen=True)
class Beat:
    """What a rank tells of itself.

    Attributes:
        count: of its beats.
        phase, step, marks, watched: of its :class:`Pulse`.
        line, waiting: where its main thread is.
        left: the exit code with which it ends, once it does.
        reason: why, unless it tells the user itself.
    """

    count: int
    host: str
    phase: str
    step: int
    marks: int
    watched: bool
    line: str
    waiting: bool
    left: int | None = None
    reason: str = ""

    @property
    def doing(self) -> str:
        return f"{self.phase}, step {self.step}" if self.step else self.phase


@dataclass
class _Seen:
    """The last beat of a rank, and since when it and its marks are the same."""

    beat: Beat
    beat_since: float
    marks_since: float


class Heartbeat:
    """Beats for this rank and watches the others, from two threads: one talks to the store, which may never answer, the
    other only looks at the clock.

    Seconds are those in which this process ran: one that was itself frozen must not take the others for dead.

    Args:
        pulse: of the main thread.
    """

    def __init__(self, pulse: Pulse) -> None:
        self.pulse = pulse
        self._host = socket.gethostname()
        # A worker that outlives its launcher would write into the folder of the run that is started next.
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._store: dist.Store | None = None
        self._left: int | None = None
        self._reason = ""
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._ending = threading.Lock()
        self._hurry = False
        self._seen: dict[int, _Seen] = {}
        self._awake = self._answered = 0.0
        self.rank, self.size = 0, 1

    def start(self, timeout_seconds: float) -> None:
        """Begin; every rank must call it, once there is a process group.

        Args:
            timeout_seconds: a rank lost or hanging is noticed within them.

        Raises:
            UnreachableError: not every rank called it in that time.
        """
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.timeout = timeout_seconds
        self.interval = min(BEAT_SECONDS, timeout_seconds / 10)
        if self.size > 1:
            # A connection of its own: another thread may wait for an answer on the group's.
            store: Any = dist.distributed_c10d._get_default_store()  # its type leaves clone() out
            self._store = dist.PrefixStore("heartbeat", store.clone())
            self._store.set(str(self.rank), _encode(self._beat(0)))
            self._wait_for_all(self._store, timedelta(seconds=timeout_seconds))
            self._holds_store = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            self._thread = threading.Thread(target=self._beats, args=(self._store,), name="heartbeat", daemon=True)
            self._thread.start()
        threading.Thread(target=self._clock, name="heartbeat-clock", daemon=True).start()

    def leave(self, code: int, reason: str = "") -> None:
        """Tell the others that this rank ends with ``code``: it is not to be missed, or not to be waited for.

        Args:
            reason: for the user, from whoever misses this rank; empty if it is told here.
        """
        self._reason, self._left = reason, code
        self._wake.set()
        if self._thread is not None:
            self._thread.join(2 * self.interval)
            if code and self._holds_store:
                time.sleep(2 * self.interval)  # until the others have read it

    def yield_to_others(self, code: int) -> None:
        """As :meth:`leave`, for a rank that ends because it was told to. If another one has failed before, that is why,
        and this one ends with its exit code."""
        self._hurry = True
        self.leave(code)

    def blame_others(self) -> None:
        """Call it when a collective failed: if that was because a rank was lost, this does not return."""
        if self._store is not None:
            self._hurry = True
            self._wake.set()
            time.sleep((_HURRY_BEATS + 2) * self.interval)

    def _wait_for_all(self, store: dist.Store, timeout: timedelta) -> None:
        """Until everybody has a beat. Not a barrier: on NCCL nothing ends that when a rank has died."""
        ranks = [str(rank) for rank in range(self.size)]
        try:
            store.wait(ranks, timeout)
        except RuntimeError as error:
            raise UnreachableError(
                f"not all {self.size} ranks began to train within {timeout.total_seconds():.0f} s of rank {self.rank} "
                f"on {self._host} ({str(error).splitlines()[0]})"
            ) from None

    # ------------------------------------------------------------------ threads

    def _beats(self, store: dist.Store) -> None:
        count = 0
        while True:
            count += 1
            self._wake.clear()
            left = self._left
            try:
                store.set(str(self.rank), _encode(self._beat(count, left)))
                self._read(store)
            except RuntimeError:
                # The connection is closed and will not come back. Either rank 0 has finished, or the clock says so
                # soon, unless something that explains it comes first.
                if 0 in self._seen and self._seen[0].beat.left == 0:
                    self._store = None
                self._hurry = True
                return
            self._answered = self._awake
            if left is not None:
                return
            self._wake.wait(self.interval)

    def _read(self, store: dist.Store) -> None:
        """Read the others' beats and end if one is missed."""
        if store.check(["verdict"]):
            verdict = json.loads(store.get("verdict"))
            # Once per node, beside the rank that spoke it.
            self._exit(verdict["code"], verdict["line"] if verdict["host"] != self._host else "")
        others = range(self.size) if self.rank == 0 or self._hurry else (0,)
        watched = [rank for rank in others if rank != self.rank]
        for rank, text in zip(watched, store.multi_get([str(rank) for rank in watched]), strict=True):
            self._note(rank, Beat(**json.loads(text)))
        self._judge_failed(watched)
        self._judge_life(watched)
        if self.rank == 0:
            self._note(0, self._beat(0))
            self._judge_progress()

    def _clock(self) -> None:
        tick, last = self.interval / 2, time.monotonic()
        while self._left is None:
            time.sleep(tick)
            now = time.monotonic()
            self._awake += min(now - last, 2 * tick)
            last = now
            if self._launcher is not None and os.getppid() != self._launcher:
                launcher = f"the launcher of rank {self.rank} on {self._host}"
                self._end(LOST_RANK, f"{launcher} is dead (process {self._launcher})")
            silent = self._awake - self._answered
            if self._store is not None and silent > self._limit:
                line = f"the store at {store_address()} has not answered for {silent:.0f} s"
                known = self.rank and 0 in self._seen
                self._end(LOST_RANK, f"lost {self._name(0)}: {line}, {self._last(0)}" if known else line)

    # ------------------------------------------------------------------ judging

    @property
    def _limit(self) -> float:
        """Seconds without a sign after which a rank is lost, so that this is said before the timeout."""
        return _HURRY_BEATS * self.interval if self._hurry else self.timeout - 2 * self.interval

    def _note(self, rank: int, beat: Beat) -> None:
        seen = self._seen.setdefault(rank, _Seen(beat, self._awake, self._awake))
        if beat.count != seen.beat.count:
            seen.beat_since = self._awake
        if beat.marks != seen.beat.marks:
            seen.marks_since = self._awake
        seen.beat = beat

    def _judge_failed(self, ranks: Iterable[int]) -> None:
        patience = 0.0 if self._hurry else _HURRY_BEATS * self.interval
        for rank in ranks:
            seen, code = self._seen[rank], self._seen[rank].beat.left
            # When all fail alike, each ends by itself.
            if code and code != self._left and self._awake - seen.beat_since >= patience:
                ended = f"{self._name(rank)} ended with exit code {code}, {self._last(rank)}"
                self._end(code, f"{seen.beat.reason} ({self._name(rank)})" if seen.beat.reason else ended)

    def _judge_life(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            seen = self._seen[rank]
            silent = self._awake - seen.beat_since
            if seen.beat.left is None and silent > self._limit:
                self._end(LOST_RANK, f"lost {self._name(rank)}: no sign of life for {silent:.0f} s, {self._last(rank)}")

    def _judge_progress(self) -> None:
        present = {rank: seen for rank, seen in self._seen.items() if seen.beat.left is None}
        least = min(seen.beat.marks for seen in present.values())
        behind = {rank: seen for rank, seen in present.items() if seen.beat.marks == least}
        idle = self._awake - max(seen.marks_since for seen in behind.values())
        if idle <= self.timeout - 2 * self.interval or not all(seen.beat.watched for seen in behind.values()):
            return
        if any(self._is_silent(rank) for rank in behind):
            return  # its last mark is older than its last beat, but it is lost, not late: that is judged in time too
        if len(behind) == len(present):
            # All at the same mark: those that wait for a collective are not late. Maybe nobody is seen to wait:
            # kernels behind one that hangs fill CUDA's queue, and then the host stands wherever it starts one.
            behind = {rank: seen for rank, seen in present.items() if not seen.beat.waiting} or present
        names = ", ".join(self._name(rank) for rank in sorted(behind)[:8])
        what = "the others wait" if len(behind) < len(present) else "all stand there"
        lines = list(dict.fromkeys(behind[rank].beat.line for rank in sorted(behind)))
        where = f"{self._last(min(behind))}, at {' and '.join(lines[:3])}"
        self._end(LOST_RANK, f"{names}: no progress for {idle:.0f} s while {what}, {where}")

    def _is_silent(self, rank: int) -> bool:
        return rank != self.rank and self._awake - self._seen[rank].beat_since > _HURRY_BEATS * self.interval

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._seen[rank].beat.host}"

    def _last(self, rank: int) -> str:
        return f"last heard of in {self._seen[rank].beat.doing}"

    def _beat(self, count: int, left: int | None = None) -> Beat:
        pulse, place = self.pulse, main_thread()
        doing = (pulse.phase, pulse.step, pulse.marks, pulse.watched, place.line, place.waiting)
        return Beat(count, self._host, *doing, left, "" if left is None else self._reason)

    # ------------------------------------------------------------------ ending

    def _end(self, code: int, line: str) -> None:
        """End this process, and through the verdict all others."""
        # The store may be what is lost: then the first rank of each node says the line.
        says = [os.environ.get("LOCAL_RANK", "0") == "0"]
        helper = threading.Thread(target=self._leave_verdict, args=(code, line, says), daemon=True)
        helper.start()
        helper.join(1.0)
        self._exit(code, line if says[0] else "")

    def _leave_verdict(self, code: int, line: str, says: list[bool]) -> None:
        if self._store is None:
            return
        verdict = json.dumps({"code": code, "line": line, "host": self._host, "rank": self.rank})
        try:
            says[0] = self._store.compare_set("verdict", "", verdict).decode() == verdict
        except RuntimeError:
            return

    def _exit(self, code: int, line: str) -> None:
        with self._ending:  # never released: one thread ends the process
            if line:
                print(f"\nerror: {line}{_AGAIN if code == LOST_RANK else ''}", file=sys.stderr, flush=True)
            # The main thread may be inside C++ for ever.
            os._exit(code)


def _encode(beat: Beat) -> str:
    return json.dumps(asdict(beat))
