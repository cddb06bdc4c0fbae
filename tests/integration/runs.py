"""What the integration tests read from a run's output folder, and ways to kill a run at a chosen moment."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lrdint_tune.training.checkpoint.folder import LOCK_FILE
from lrdint_tune.training.interruption import REPEAT_SECONDS
from lrdint_tune.training.trainer import Trainer
from tests.common.tiny_run import read_losses
from tests.distributed.harness import run_recipe

Prepare = Sequence[Callable[[], None]]
DECIMALS = 1e-6
KILLED = -signal.SIGKILL
# 8 steps in two epochs of 4.
SHORT: dict[str, Any] = {"max_steps_per_epoch": 4, "global_batch_size": 2, "dataset_val__num_rows": 4}


def killed(config: Path, *overrides: str, step: int, size: int = 1, rank: int = 0, prepare: Prepare = ()) -> None:
    """Run until ``rank`` dies after ``step`` steps."""
    outcome = run_recipe(config, *overrides, size=size, prepare=[*prepare, partial(kill_at, step, rank)])
    assert outcome.codes[rank] == KILLED, outcome.outputs
    assert all(outcome.codes), "the other ranks must not report success"


def finished_run(config: Path, *overrides: str, size: int = 1, prepare: Prepare = ()) -> None:
    """Run to the end."""
    outcome = run_recipe(config, *overrides, size=size, prepare=prepare)
    assert outcome.codes == [0] * size, outcome.outputs


def assert_same_losses(output_dir: Path, expected: Path | dict[int, float]) -> None:
    """Every step's loss, equal to 6 decimals, each step once in both records."""
    want = expected if isinstance(expected, dict) else read_losses(expected)
    got = read_losses(output_dir)
    assert list(got) == list(want)
    assert {step: loss for step, loss in got.items() if abs(loss - want[step]) > DECIMALS} == {}
    assert_one_curve(output_dir)


def assert_one_curve(output_dir: Path) -> None:
    """TensorBoard and ``metrics.jsonl`` hold the same values, and each tag has every step at most once, in order."""
    curves = tensorboard(output_dir)
    lines = [json.loads(line) for line in (output_dir / "logs" / "metrics.jsonl").read_text().splitlines()]
    recorded: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for tag, value in line.items():
            if tag != "step":
                recorded.setdefault(tag, []).append((line["step"], value))
    assert curves.keys() == recorded.keys()
    for tag, points in recorded.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag
        assert [step for step, _ in curves[tag]] == steps, tag
        for (_, shown), (_, value) in zip(curves[tag], points, strict=True):
            assert abs(shown - value) <= 1e-6 * max(1.0, abs(value)), tag


def tensorboard(output_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value), as TensorBoard shows it."""
    events = EventAccumulator(str(output_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def values(output_dir: Path, tag: str) -> dict[int, float]:
    """Step -> value of a tag in ``metrics.jsonl``."""
    lines = (output_dir / "logs" / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line[tag] for line in map(json.loads, lines) if tag in line}


def checkpoints(output_dir: Path) -> list[str]:
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir() if path.is_dir())


def tree(folder: Path) -> dict[str, str]:
    """Path -> digest of every file below ``folder``, but for the lock that each run takes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill_at(step: int, rank: int = 0) -> None:
    """Make ``rank`` die of SIGKILL when it starts the step after ``step``, with no save under way."""
    original = Trainer._train_step

    def train_step(self: Trainer, *args: Any) -> Any:
        if self.step == step and dist.get_rank() == rank:
            if self.checkpoints._pending is not None:
                self.checkpoints._pending.upload.result()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args)

    Trainer._train_step = train_step  # type: ignore[assignment,method-assign]


def signal_in(method: str, number: int, *, step: int = 0, rank: int | None = None, times: int = 1) -> None:
    """Make ``rank`` (None: every rank) send itself a signal when it enters the trainer's ``method`` after ``step``
    steps, and again as often as ``times`` says, far enough apart to count."""
    original = getattr(Trainer, method)

    def signalled(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "step", 0) == step and rank in (None, dist.get_rank()):
            for _ in range(times):
                os.kill(os.getpid(), number)
                while self.interruption.received is None:  # another thread takes it
                    time.sleep(0.001)
                time.sleep(REPEAT_SECONDS + 0.2 if times > 1 else 0)
        return original(self, *args, **kwargs)

    setattr(Trainer, method, signalled)
