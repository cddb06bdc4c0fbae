"""Run a function on several gloo processes, or the recipe as its own process, without paying for imports each time.

Processes are forked from a server that has imported the trainer once and has done nothing else: a start takes
milliseconds, and no process inherits threads, random state or environment of the test that started it.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import runpy
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RECIPE = "lrdint_tune.full_finetune_distributed"
GRACE_SECONDS = 2.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed.checkpoint", "datasets", "lrdint_tune.training.trainer"])


class RankFailed(AssertionError):
    """A rank raised, died or did not end in time; the message holds what each rank printed, with its traceback."""


@dataclass(frozen=True)
class Outcome:
    """How the processes ended: exit codes (negative: the signal), output and return values, by rank."""

    codes: list[int | None]
    outputs: list[str]
    results: list[Any]

    @property
    def errors(self) -> list[str]:
        """The lines of rank 0 that tell the user what was wrong."""
        return [line for line in self.lines if line.startswith("error:")]

    @property
    def lines(self) -> list[str]:
        """What rank 0 printed."""
        return self.outputs[0].replace("\r", "\n").splitlines()


def run_ranks(function: Callable[..., Any], size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call ``function(*args)`` on ``size`` processes that form a gloo group; returns their results, by rank.

    ``function``, arguments and results are pickled, so the function stands at the top of its module.

    Raises:
        RankFailed: a rank did not return; the others are killed.
    """
    outcome = start_ranks(function, size, *args, timeout=timeout)
    if any(outcome.codes):
        raise RankFailed(_report(f"exit codes {outcome.codes}", outcome.outputs))
    return outcome.results


def run_recipe(
    config: str | Path,
    *overrides: str,
    size: int = 1,
    prepare: Sequence[Callable[[], None]] = (),
    timeout: float = 60.0,
    grace: float = GRACE_SECONDS,
) -> Outcome:
    """Run the entry point on a config as ``python -m`` (``size`` 1) or a launcher (more) would.

    Args:
        overrides: ``key=value`` arguments.
        prepare: called in every process before the recipe, to make something fail.
        grace: seconds for the other ranks to end when one has failed.
    """
    arguments = (str(config), overrides, tuple(prepare))
    return start_ranks(_recipe, size, *arguments, timeout=timeout, grace=grace, group=size > 1)


def start_ranks(
    function: Callable[..., Any],
    size: int,
    *args: Any,
    timeout: float = 60.0,
    grace: float = GRACE_SECONDS,
    group: bool = True,
) -> Outcome:
    """As :func:`run_ranks`, but how the processes ended is for the caller to judge.

    When one ends with another exit code than 0, the others have ``grace`` seconds to end too and are then killed.

    Args:
        group: whether the processes form a gloo group; without it nothing tells them of each other.

    Raises:
        RankFailed: not over in ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as scratch:
        folder = Path(scratch)
        processes = [
            _context.Process(target=_run, args=(function, args, rank, size if group else 0, folder), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        in_time = _join(processes, timeout, grace)
        outputs = [_read(folder / f"{rank}.out") for rank in range(size)]
        if not in_time:
            raise RankFailed(_report(f"not over after {timeout} s", outputs))
        results = [_result(folder / f"{rank}.result") for rank in range(size)]
        return Outcome([process.exitcode for process in processes], outputs, results)


def _join(processes: list[Any], timeout: float, grace: float) -> bool:
    """Wait for the processes, kill what is left; False when the time was up."""
    end = time.monotonic() + timeout
    failed = False
    while alive := [p for p in processes if p.is_alive()]:
        left = end - time.monotonic()
        if left <= 0:
            break
        wait([p.sentinel for p in alive], timeout=left)
        if not failed and any(p.exitcode for p in processes):
            failed, end = True, min(end, time.monotonic() + grace)
    for process in alive:
        process.kill()
        process.join()
    return failed or not alive


def _run(function: Callable[..., Any], args: tuple[Any, ...], rank: int, size: int, folder: Path) -> None:
    with open(folder / f"{rank}.out", "wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    # The server's own may be closed by now: a test runner captured them.
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    if size:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
    try:
        result = function(*args)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    (folder / f"{rank}.result").write_bytes(pickle.dumps(result))


def _recipe(config: str, overrides: tuple[str, ...], prepare: tuple[Callable[[], None], ...]) -> None:
    for change in prepare:
        change()
    sys.argv = ["full_finetune_distributed", "--config", config, *overrides]
    runpy.run_module(RECIPE, run_name="__main__")


def _report(what: str, outputs: list[str]) -> str:
    return "\n".join([what, *(f"--- rank {rank} of {len(outputs)}\n{text}" for rank, text in enumerate(outputs))])


def _read(file: Path) -> str:
    return file.read_text(errors="replace") if file.is_file() else ""


def _result(file: Path) -> Any:
    return pickle.loads(file.read_bytes()) if file.is_file() else None
