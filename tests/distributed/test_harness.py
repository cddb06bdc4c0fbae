"""The harness reports what a rank did, and does not wait for a dead one."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import RankFailed, run_ranks, start_ranks


def _sum(addend: float) -> float:
    total = torch.tensor([dist.get_rank() + addend])
    dist.all_reduce(total)
    return total.item()


def _fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise KeyError("only on rank 1")
    dist.barrier()


def _die_on_one() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30)


def test_results_by_rank() -> None:
    assert run_ranks(_sum, 2, 0.5) == [2.0, 2.0]


def test_failure_shows_the_traceback_of_the_rank() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1 of 2.*KeyError: 'only on rank 1'"):
        run_ranks(_fail_on_one, 2)


def test_a_killed_rank_ends_the_others() -> None:
    start = time.monotonic()
    assert start_ranks(_die_on_one, 2).codes == [-signal.SIGKILL, -signal.SIGKILL]
    assert time.monotonic() - start < 20


def test_time_is_limited() -> None:
    with pytest.raises(RankFailed, match="not over after 0.5 s"):
        run_ranks(time.sleep, 2, 20, timeout=0.5)
