"""One tiny run, trained once without interruption, that the tests compare with."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lrdint_tune.training.world import end_world
from tests.common.tiny_run import write_run
from tests.distributed.harness import run_recipe
from tests.integration.runs import SHORT


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """A world that a test starts in this process listens on a port, which the runs of later tests would inherit."""
    before = dict(os.environ)
    yield
    end_world()
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if name not in before:
            os.environ.pop(name, None)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 steps in two epochs of 4, checkpoints after 3, 6 and 8; give each run its own output_dir."""
    return write_run(tmp_path_factory.mktemp("tiny"), **SHORT)


@pytest.fixture(scope="session")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of the uninterrupted run on one process; not to be written to."""
    output = tmp_path_factory.mktemp("finished") / "out"
    outcome = run_recipe(config, f"output_dir={output}")
    assert outcome.codes == [0], outcome.outputs
    return output
