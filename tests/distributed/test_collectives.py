"""What travels in a step: the gradients of what is trained, once."""

from pathlib import Path

import pytest

from tests.common.tiny_run import write_run
from tests.distributed.harness import run_ranks
from tests.distributed.steps import reduced_elements


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), lr_scheduler=None, dataset_val=None)


@pytest.mark.parametrize("trainable", [["adapter"], ["adapter", "attention"], ["all"]], ids=str)
def test_frozen_parameters_do_not_travel(run: Path, trainable: list[str]) -> None:
    for elements, trained in run_ranks(reduced_elements, 2, run, {"trainable": trainable}):
        assert sum(elements) == trained


def test_passes_of_a_step_travel_once(run: Path) -> None:
    once, often = (run_ranks(reduced_elements, 2, run, {"batch_size": size})[0][0] for size in (2, 1))
    assert len(once) > 0
    assert often == once
