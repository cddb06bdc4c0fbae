"""NaN or infinity stops the run before anything is updated with it, or costs that one step, and says where it came
from."""

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import lrdint_tune.training.trainer as trainer_module
from lrdint_tune.exit_codes import NONFINITE
from lrdint_tune.training.data import Batch
from lrdint_tune.training.trainer import Trainer
from tests.common.tiny_run import read_losses
from tests.distributed.harness import run_recipe
from tests.integration.runs import assert_one_curve, assert_same_losses, checkpoints, killed, tree, values


def _change_losses(change: Callable[[Trainer, Batch, Tensor], Tensor]) -> None:
    """Put ``change`` of each training loss in its place."""
    train, summed_loss = Trainer.train, trainer_module.summed_loss

    def changed(self: Trainer) -> None:
        trainer_module.summed_loss = lambda model, loader, batch, device: change(
            self, batch, summed_loss(model, loader, batch, device)
        )
        train(self)

    Trainer.train = changed  # type: ignore[method-assign]


def _bad_batch(step: int, rank: int, value: float) -> None:
    """Make the loss of the second micro-batch of ``rank`` (of its only one, with two ranks) ``value`` in the step after
    ``step``, and print its rows."""
    seen = [0]

    def loss(self: Trainer, batch: Batch, result: Tensor) -> Tensor:
        if self.step == step and dist.get_rank() == rank:
            seen[0] += 1
            if seen[0] == self.accumulation:
                print("BAD ROWS", sorted(batch.row_ids), flush=True)
                return result * value
        return result

    _change_losses(loss)


def _bad_gradient(step: int) -> None:
    """A finite loss whose gradient is infinite."""

    def loss(self: Trainer, batch: Batch, result: Tensor) -> Tensor:
        if self.step == step:
            result.register_hook(lambda gradient: gradient * math.inf)
        return result

    _change_losses(loss)


def bad_rows(outputs: list[str]) -> str:
    match = re.search(r"BAD ROWS (\[.*?\])", "".join(outputs))
    assert match, outputs
    return match.group(1)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_loss(config: Path, tmp_path: Path, size: int, value: float) -> None:
    """Only the bad micro-batch's rows are named, whichever rank had it; the loss is recorded nowhere."""
    out = f"output_dir={tmp_path}"
    killed(config, out, step=3, size=size)
    before = tree(tmp_path / "checkpoints")
    outcome = run_recipe(config, out, size=size, prepare=[partial(_bad_batch, 4, size - 1, value)])
    assert outcome.codes == [NONFINITE] * size, outcome.outputs
    (error,) = outcome.errors
    assert error.startswith(f"error: step 5: loss {value}")
    assert f"dataset rows {bad_rows(outcome.outputs)};" in error
    assert error.endswith("checkpoint step-3 stands")
    assert tree(tmp_path / "checkpoints") == before
    assert list(read_losses(tmp_path)) == [1, 2, 3, 4]
    assert not (tmp_path / "hf").exists()


def test_bad_gradient_before_the_first_checkpoint(config: Path, tmp_path: Path) -> None:
    outcome = run_recipe(config, f"output_dir={tmp_path}", prepare=[partial(_bad_gradient, 1)])
    assert outcome.codes == [NONFINITE], outcome.outputs
    (error,) = outcome.errors
    assert error.startswith("error: step 2: loss ")
    assert "gradient norm" in error and "(loss finite, gradient not)" in error
    assert error.endswith("there is no checkpoint yet")
    assert checkpoints(tmp_path) == []


def test_nothing_is_updated(config: Path, tmp_path: Path) -> None:
    """Parameters and optimizer state when the run stops are those before the step."""
    outcome = run_recipe(config, f"output_dir={tmp_path}", prepare=[partial(_bad_gradient, 1), _watch_optimizer])
    assert outcome.codes == [NONFINITE]
    assert outcome.outputs[0].count("OPTIMIZER STEP") == 1


SKIP = "on_nonfinite=skip_step"


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_skipped_step(config: Path, finished: Path, tmp_path: Path, size: int, value: float) -> None:
    """Every rank leaves out that one update; data and schedule go on, and the record has a gap and a count."""
    prepare = [partial(_bad_batch, 4, size - 1, value), _watch_optimizer]
    outcome = run_recipe(config, f"output_dir={tmp_path}", SKIP, size=size, prepare=prepare)
    assert outcome.codes == [0] * size, outcome.outputs
    assert [output.count("OPTIMIZER STEP") for output in outcome.outputs] == [7] * size
    warnings = [line for line in outcome.lines if line.startswith("step 5: loss")]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"step 5: loss {value}")
    assert f"dataset rows {bad_rows(outcome.outputs)}; skipped, 1 of at most 10" in warnings[0]
    before, losses = read_losses(finished), read_losses(tmp_path)
    assert list(losses) == [1, 2, 3, 4, 6, 7, 8]
    if size == 1:
        assert [losses[step] for step in (1, 2, 3, 4)] == [before[step] for step in (1, 2, 3, 4)]
    assert all(math.isfinite(loss) for loss in losses.values())
    assert values(tmp_path, "skipped_steps") == dict.fromkeys(range(1, 5), 0) | dict.fromkeys(range(5, 9), 1)
    assert values(tmp_path, "lr") == values(finished, "lr")
    assert "NaN" not in (tmp_path / "logs" / "metrics.jsonl").read_text()
    assert_one_curve(tmp_path)


def test_skipped_gradient(config: Path, tmp_path: Path) -> None:
    """A step whose gradient alone is infinite is left out too: what follows is what a run makes that has all the data
    but not that update."""
    outcome = run_recipe(config, f"output_dir={tmp_path}", SKIP, prepare=[partial(_bad_gradient, 1), _watch_optimizer])
    assert outcome.codes == [0], outcome.outputs
    assert outcome.outputs[0].count("OPTIMIZER STEP") == 7
    assert "(loss finite, gradient not); skipped, 1 of" in outcome.outputs[0]


@pytest.mark.slow
def test_limit_holds_over_restarts(config: Path, tmp_path: Path) -> None:
    """The count belongs to the checkpoint, and a resumed run goes on as if it had not been interrupted."""
    bad = partial(_bad_batch, 1, 0, math.nan)
    options = [SKIP, "max_skipped_steps=1"]
    whole = run_recipe(config, f"output_dir={tmp_path / 'whole'}", *options, prepare=[bad])
    assert whole.codes == [0], whole.outputs
    out = f"output_dir={tmp_path / 'killed'}"
    killed(config, out, *options, step=4, prepare=[bad])
    limited = run_recipe(config, out, *options, prepare=[partial(_bad_batch, 5, 0, math.inf)])
    assert limited.codes == [NONFINITE], limited.outputs
    (error,) = limited.errors
    assert error.startswith("error: step 6: loss inf")
    assert "max_skipped_steps=1 were skipped before; no update was made; checkpoint step-3 stands" in error
    resumed = run_recipe(config, out, *options)
    assert resumed.codes == [0], resumed.outputs
    assert_same_losses(tmp_path / "killed", tmp_path / "whole")


def _watch_optimizer() -> None:
    original: Callable[..., Any] = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        print("OPTIMIZER STEP", flush=True)
        return original(self, *args, **kwargs)

    torch.optim.AdamW.step = step  # type: ignore[method-assign]
