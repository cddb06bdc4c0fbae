"""A run that goes on with other numbers of processes sees every row that the uninterrupted run sees, once, in the same
steps, and has its losses."""

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lrdint_tune.training.data import Batch, BatchLoader
from lrdint_tune.training.trainer import Trainer
from tests.common.tiny_run import read_losses, write_run
from tests.integration.runs import checkpoints, finished_run, killed

pytestmark = pytest.mark.slow

# 12 steps in two epochs; 80 packs of the 120 rows, so rows share sequences.
RUN: dict[str, Any] = {"epochs": 2, "max_steps_per_epoch": 6, "save_every_n_steps": 3, "dataset_val": None}


def record_rows(folder: Path) -> None:
    """Let every rank write down which rows it trains on in which step."""
    take, train_step = BatchLoader.next_batch, Trainer._train_step
    step = 0

    def taken(self: BatchLoader) -> Batch:
        batch = take(self)
        with open(folder / f"rows-{dist.get_rank()}.jsonl", "a") as file:
            file.write(json.dumps([step, batch.row_ids]) + "\n")
        return batch

    def stepping(self: Trainer, *args: Any) -> Any:
        nonlocal step
        step = self.step + 1
        return train_step(self, *args)

    BatchLoader.next_batch, Trainer._train_step = taken, stepping  # type: ignore[method-assign,assignment]


def rows_by_step(folder: Path) -> dict[int, Counter[int]]:
    """Step -> how often each row was seen in it; the files are removed."""
    seen: dict[int, Counter[int]] = {}
    for file in folder.glob("rows-*.jsonl"):
        for step, rows in map(json.loads, file.read_text().splitlines()):
            seen.setdefault(step, Counter()).update(rows)
        file.unlink()
    return seen


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("ranks"), model__lam_init=0.2, **RUN)


def attempts(config: Path, out: Path, plan: list[tuple[int, int | None]]) -> Iterator[dict[int, Counter[int]]]:
    """Run with ``size`` ranks until one dies after ``step`` steps (None: to the end), for each of the plan."""
    for size, step in plan:
        prepare = [partial(record_rows, out)]
        if step is None:
            finished_run(config, f"output_dir={out}", size=size, prepare=prepare)
        else:
            killed(config, f"output_dir={out}", step=step, size=size, rank=size - 1, prepare=prepare)
        # Who survives the dead rank may have begun the step that is not made.
        yield {made: rows for made, rows in rows_by_step(out).items() if step is None or made <= step}


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param([(1, 3), (2, 6), (4, 9), (1, None)], id="1-2-4-1"),
        pytest.param([(1, 4), (2, 8), (4, 11), (1, None)], id="1-2-4-1, between checkpoints"),
    ],
)
def test_rows_and_losses(config: Path, tmp_path: Path, plan: list[tuple[int, int | None]]) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    (expected,) = attempts(config, whole, [(1, None)])
    assert len(expected) == 12 and all(expected.values())

    found: dict[int, Counter[int]] = {}
    for (_, death), seen in zip(plan, attempts(config, cut, plan), strict=True):
        for step in found.keys() & seen.keys():
            assert seen[step] == found[step], "a step made again must take the same rows"
        found |= seen
        if death is not None:
            assert max(seen) == death
            assert checkpoints(cut)[-1] == f"step-{death // 3 * 3}"
    assert found == expected
    assert sum(found.values(), Counter()) == sum(expected.values(), Counter())
    assert read_losses(cut) == pytest.approx(read_losses(whole), abs=1e-4)
