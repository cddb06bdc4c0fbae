"""Who is judged lost, without processes: beats that a rank 0 reads, and a clock that is set by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lrdint_tune.exit_codes import LOST_RANK
from lrdint_tune.training.heartbeat import Beat, Heartbeat
from lrdint_tune.training.pulse import Pulse, Whereabouts, agreed, main_thread

TIMEOUT = 60.0


class Ended(Exception):
    """In place of the end of the process."""


class Watch(Heartbeat):
    """Rank 0 of some ranks."""

    def __init__(self, **others: Any) -> None:
        super().__init__(Pulse())
        self.timeout, self.interval = TIMEOUT, 1.0
        for rank in range(3):
            self.hear(rank, 1)

    def hear(self, rank: int, count: int, **changes: Any) -> None:
        """Rank's beat number ``count``, in the middle of step 7."""
        known = {"phase": "training", "step": 7, "marks": 40, "watched": True, "line": "f.py:1 (f)", "waiting": False}
        self._note(rank, Beat(count=count, host=f"host-{rank}", **{**known, **changes}))

    def later(self, seconds: float) -> None:
        self._awake += seconds

    def judge(self) -> str | None:
        """The line with which the job ends, if it does."""
        try:
            self._judge_failed([1, 2])
            self._judge_life([1, 2])
            self._judge_progress()
        except Ended as end:
            return str(end)
        return None

    def _end(self, code: int, line: str) -> None:
        raise Ended(f"{code}: {line}")


def test_a_beat_that_stops() -> None:
    watch = Watch()
    for count in range(2, 60):
        watch.later(1)
        for rank in (0, 1):
            watch.hear(rank, count, marks=40 + count)
        assert watch.judge() is None
    watch.later(1)
    assert (
        watch.judge()
        == f"{LOST_RANK}: lost rank 2 on host-2: no sign of life for 59 s, last heard of in training, step 7"
    )


def test_a_beat_that_stops_in_a_long_step() -> None:
    """Its last mark is older than its last beat: it is lost, not late."""
    watch = Watch()
    for count in range(2, 12):
        watch.later(1)
        for rank in range(3):
            watch.hear(rank, count, waiting=rank != 2)
    for count in range(12, 70):
        watch.later(1)
        for rank in (0, 1):
            watch.hear(rank, count, waiting=True)
        assert watch.judge() is None
    watch.later(1)
    assert str(watch.judge()).startswith(f"{LOST_RANK}: lost rank 2 on host-2: no sign of life for 59 s")


@pytest.mark.parametrize(("stuck", "said"), [([1], "rank 1 on host-1"), ([1, 2], "rank 1 on host-1, rank 2 on host-2")])
def test_behind_the_others(stuck: list[int], said: str) -> None:
    watch = Watch()
    watch.later(58.5)
    for rank in range(3):
        watch.hear(rank, 2, marks=40 if rank in stuck else 41)
    where = "last heard of in training, step 7, at f.py:1 (f)"
    assert watch.judge() == f"{LOST_RANK}: {said}: no progress for 58 s while the others wait, {where}"


def test_at_the_same_mark_the_one_outside_the_collective_is_late() -> None:
    watch = Watch()
    watch.later(58.5)
    for rank in range(3):
        watch.hear(rank, 2, waiting=rank != 2)
    assert "rank 2 on host-2: no progress" in str(watch.judge())


@pytest.mark.parametrize("waiting", [True, False])
def test_all_at_the_same_mark(waiting: bool) -> None:
    """In a collective, or wherever CUDA holds up a host whose GPU is stuck."""
    watch = Watch()
    watch.later(58.5)
    for rank in range(3):
        watch.hear(rank, 2, waiting=waiting, line=f"f.py:{min(rank, 1)} (f)")
    assert watch.judge() == (
        f"{LOST_RANK}: rank 0 on host-0, rank 1 on host-1, rank 2 on host-2: no progress for 58 s while all stand "
        "there, last heard of in training, step 7, at f.py:0 (f) and f.py:1 (f)"
    )


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param([{"waiting": True}, {"waiting": True}, {"watched": False, "marks": 39}], id="one loads or saves"),
        pytest.param([{"marks": 41}, {"marks": 41}, {"left": 0}], id="one has finished"),
    ],
)
def test_no_hang(changes: list[dict[str, Any]]) -> None:
    watch = Watch()
    for rank in range(3):
        watch.hear(rank, 2, **changes[rank])
    watch.later(58.5)
    for rank in range(3):
        watch.hear(rank, 3, **{**changes[rank], **({} if rank == 2 else {"marks": 50} if "left" in changes[2] else {})})
    assert watch.judge() is None


def test_a_rank_that_failed_is_named_when_the_others_do_not_fail_too() -> None:
    watch = Watch()
    watch.hear(1, 2, left=2)
    assert watch.judge() is None, "the others may be about to end likewise"
    watch.later(4)
    watch.hear(2, 3)
    assert watch.judge() == "2: rank 1 on host-1 ended with exit code 2, last heard of in training, step 7"
    watch._left = 2
    assert watch.judge() is None


def test_a_phase_is_watched_from_the_second_time_on() -> None:
    """In the first, code is compiled."""
    pulse = Pulse()
    for expected in (False, True):
        pulse.enter("training", 1, watch=True)
        assert pulse.watched is expected
        pulse.enter("saving", 1)
        assert pulse.watched is False
    assert pulse.marks == 4


def test_where_the_main_thread_is() -> None:
    place = main_thread()
    assert place.line.startswith("pulse.py:") and "(main_thread)" in place.line
    assert not place.waiting


class Stuck:
    """In place of a tensor that a collective of NCCL will fill: reading it waits, outside torch/distributed."""

    def tolist(self) -> Whereabouts:
        return main_thread()


def test_reading_what_is_agreed_is_waiting() -> None:
    place = agreed(Stuck())  # type: ignore[arg-type]
    assert place.waiting
    assert agreed(torch.tensor([1.0, 2.0])) == [1.0, 2.0]
