"""A rank that dies, freezes or hangs ends the job in time, by name; what only takes long does not."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lrdint_tune.errors import ConfigError
from lrdint_tune.exit_codes import BAD_INPUT, CRASH, LOST_RANK
from lrdint_tune.training.trainer import Trainer
from tests.common.tiny_run import read_losses, write_run
from tests.distributed.harness import Outcome, run_recipe
from tests.integration.kill_ranks import REPOSITORY, environment, ranks_of, recorded_step, torchrun
from tests.integration.runs import KILLED, assert_same_losses, checkpoints, finished_run

pytestmark = pytest.mark.slow

HOST = socket.gethostname()
TIMEOUT = 5


def disturb(method: str, how: str, *, step: int, rank: int | None, seconds: float = 0) -> None:
    """What ``rank`` (None: every rank) does when it enters the trainer's ``method`` after ``step`` steps."""
    original = getattr(Trainer, method)

    def disturbed(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "step", 0) == step and rank in (None, dist.get_rank()):
            if hasattr(self, "checkpoints") and self.checkpoints._pending is not None:
                self.checkpoints._pending.upload.result()  # no save is under way
            if how == "sleep":
                time.sleep(seconds)
            elif how == "crash":
                raise KeyError("made to crash")
            elif how == "refuse":
                raise ConfigError("made to refuse")
            else:
                os.kill(os.getpid(), getattr(signal, how))
        return original(self, *args, **kwargs)

    setattr(Trainer, method, disturbed)


def lost(config: Path, output_dir: Path, how: str, *, rank: int = 1, seconds: float = 0) -> Outcome:
    """Run on two ranks until one is lost after step 4."""
    # A beat is up to half a second old: a longer step before makes sure that the last one is of a step.
    prepare = [
        partial(disturb, "_train_step", "sleep", step=2, rank=None, seconds=1.5),
        partial(disturb, "_train_step", how, step=4, rank=rank, seconds=seconds),
    ]
    overrides = (f"output_dir={output_dir}", f"train_timeout_seconds={TIMEOUT}")
    outcome = run_recipe(config, *overrides, size=2, prepare=prepare, grace=8)
    assert checkpoints(output_dir) == ["step-3"]
    return outcome


def said(outcome: Outcome) -> str:
    """The one line that tells what happened, without a traceback beside it."""
    text = "".join(outcome.outputs)
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.startswith("error:")]
    assert len(lines) == 1, text
    return lines[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_frozen_rank(config: Path, tmp_path: Path, rank: int) -> None:
    """SIGSTOP: all its threads stand still, its connections stay."""
    outcome = lost(config, tmp_path, "SIGSTOP", rank=rank)
    assert (outcome.codes[rank], outcome.codes[1 - rank]) == (KILLED, LOST_RANK), "the frozen one falls to the harness"
    assert f"lost rank {rank} on {HOST}: no sign of life for" in said(outcome)
    assert ", step " in said(outcome) and "the same command goes on from the last checkpoint" in said(outcome)


def test_a_killed_rank(config: Path, finished: Path, tmp_path: Path) -> None:
    outcome = lost(config, tmp_path, "SIGKILL")
    assert outcome.codes == [LOST_RANK, KILLED], outcome.outputs
    assert f"lost rank 1 on {HOST}" in said(outcome)
    assert "Traceback" not in outcome.outputs[0]
    finished_run(config, f"output_dir={tmp_path}", size=2)
    assert_same_losses(tmp_path, finished)


def test_a_hanging_rank(config: Path, tmp_path: Path) -> None:
    """Its threads live, so only its progress tells."""
    outcome = lost(config, tmp_path, "sleep", seconds=40)
    assert outcome.codes == [LOST_RANK, LOST_RANK], outcome.outputs
    assert f"rank 1 on {HOST}: no progress for" in said(outcome)
    assert "while the others wait, last heard of in training, step 4" in said(outcome)


def nccl_like() -> None:
    """A collective's call returns at once; who reads its result first waits, in C, outside torch/distributed."""
    all_reduce, pending = dist.all_reduce, []

    def start(tensor: torch.Tensor, **where: Any) -> None:
        if where:
            all_reduce(tensor, **where)
        else:
            pending.append(all_reduce(tensor, async_op=True))

    def read(original: Callable[[torch.Tensor], Any], tensor: torch.Tensor) -> Any:
        while pending:
            pending.pop().wait()
        return original(tensor)

    dist.all_reduce = start
    for name in ("tolist", "item"):
        original = getattr(torch.Tensor, name)
        setattr(torch.Tensor, name, lambda tensor, original=original: read(original, tensor))


def test_a_rank_that_hangs_while_the_others_wait_for_a_result(tmp_path: Path) -> None:
    """It reads data, the others stand in the first read of the same step: only that one is late."""
    prepare = [nccl_like, partial(disturb, "_take_batches", "sleep", step=4, rank=1, seconds=40)]
    config = write_run(tmp_path, global_batch_size=2, train_timeout_seconds=3, dataset_val=None)
    outcome = run_recipe(config, size=2, prepare=prepare, grace=8)
    assert outcome.codes == [LOST_RANK, LOST_RANK], outcome.outputs
    line = said(outcome)
    assert line.startswith(f"error: rank 1 on {HOST}: no progress for"), line
    assert "while the others wait, last heard of in training, step 5, at trainer.py:" in line


def test_a_crashed_rank(config: Path, tmp_path: Path) -> None:
    """Only its own traceback is printed; the other rank names it and ends with the same code."""
    outcome = lost(config, tmp_path, "crash")
    assert outcome.codes == [CRASH, CRASH], outcome.outputs
    assert "KeyError: 'made to crash'" in outcome.outputs[1]
    assert f"rank 1 on {HOST} ended with exit code 1, last heard of in" in said(outcome)
    assert "Traceback" not in outcome.outputs[0]


def test_what_only_one_rank_refuses(config: Path, tmp_path: Path) -> None:
    """It is not the one that speaks for its machine, but its reason is told."""
    outcome = lost(config, tmp_path, "refuse")
    assert outcome.codes == [BAD_INPUT, BAD_INPUT], outcome.outputs
    assert said(outcome) == f"error: made to refuse (rank 1 on {HOST})"


def hang_at_the_end() -> None:
    """As the end of the process group does on NCCL while others are in a collective, and a save to a lost disk."""
    original = dist.destroy_process_group

    def destroy(group: dist.ProcessGroup | None = None) -> None:
        original(group) if group is not None else time.sleep(1000)

    dist.destroy_process_group = destroy
    ThreadPoolExecutor().submit(time.sleep, 1000)


@pytest.mark.parametrize(("how", "code", "line"), [("crash", CRASH, "KeyError"), ("refuse", BAD_INPUT, "error: made")])
def test_a_failure_waits_for_nothing(config: Path, tmp_path: Path, how: str, code: int, line: str) -> None:
    prepare = [hang_at_the_end, partial(disturb, "_train_step", how, step=2, rank=None)]
    outcome = run_recipe(config, f"output_dir={tmp_path}", prepare=prepare, timeout=30)
    assert outcome.codes == [code], outcome.outputs
    assert line in outcome.outputs[0]


def test_what_takes_long_is_no_hang(config: Path, finished: Path, tmp_path: Path) -> None:
    """Loading, the first step (compiled code), a save and the export, each longer than the timeout on one rank."""
    places = [("_load_model", 0), ("_take_batches", 0), ("save", 3), ("export", 8)]
    prepare = [partial(disturb, method, "sleep", step=step, rank=1, seconds=3) for method, step in places]
    overrides = (f"output_dir={tmp_path}", "train_timeout_seconds=3")
    outcome = run_recipe(config, *overrides, size=2, prepare=prepare, timeout=120)
    assert outcome.codes == [0, 0], outcome.outputs
    assert_same_losses(tmp_path, finished)


# ------------------------------------------------------------------ under torchrun


def started(config: Path, output_dir: Path, *overrides: str) -> "subprocess.Popen[bytes]":
    """A job of two ranks that has made a step."""
    output_dir.mkdir(parents=True)
    command = torchrun("--config", str(config), f"output_dir={output_dir}", *overrides)
    command[3:3] = ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]
    with open(output_dir / "log", "wb") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, env=environment(), cwd=REPOSITORY)
    while recorded_step(output_dir) < 2 and job.poll() is None:
        time.sleep(0.02)
    assert job.poll() is None, (output_dir / "log").read_text()
    return job


def gone(process: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while Path(f"/proc/{process}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    return not Path(f"/proc/{process}").exists()


@pytest.fixture(scope="module")
def long_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Longer than any test."""
    return write_run(tmp_path_factory.mktemp("long"), global_batch_size=2, epochs=1000, dataset_val=None)


def test_ranks_do_not_outlive_their_launcher(long_config: Path, tmp_path: Path) -> None:
    job = started(long_config, tmp_path / "out")
    ranks = ranks_of(job.pid).values()
    job.kill()
    job.wait()
    assert [gone(process, 10) for process in ranks] == [True, True]
    assert f"of rank 0 on {HOST} is dead (process {job.pid})" in (tmp_path / "out" / "log").read_text()
    assert "Traceback" not in (tmp_path / "out" / "log").read_text()


def test_a_job_that_stood_still_is_stopped_by_its_launcher(long_config: Path, tmp_path: Path) -> None:
    """A scheduler may freeze a whole job for longer than the timeout: no rank is to blame. Later it pre-empts it."""
    out = tmp_path / "out"
    job = started(long_config, out, "train_timeout_seconds=3")
    ranks = ranks_of(job.pid).values()
    for each in (signal.SIGSTOP, signal.SIGCONT):
        for process in ranks:
            os.kill(process, each)
        time.sleep(4)
    job.send_signal(signal.SIGUSR1)
    job.wait(60)
    text, last = (out / "log").read_text(), max(read_losses(out))
    assert text.count(f"stopped by SIGUSR1: step {last} of") == 1, text
    assert "error: " not in text, text
    assert f"step-{last}" in checkpoints(out)
