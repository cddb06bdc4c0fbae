"""Fixtures that every test may use: one thread, a fixed seed, and the folder of shared test data."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
COVERAGE = pytest.StashKey[Any]()
SENT = "coverage"  # what a worker process calls it


def shared_data_folder() -> Path:
    """Folder of the test data that is not part of the repository; LRDINT_SHARED_DATA overrides it."""
    return Path(os.environ.get("LRDINT_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors run faster on one thread, and reductions are then summed in one order."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
    yield


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """torch.compile'd callables run eagerly: FlexAttention's masks and results without half a minute of compilation."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Path of the shared test data; skips the test where it is absent."""
    folder = shared_data_folder()
    if not folder.is_dir():
        pytest.skip(f"shared test data not found at {folder} (set LRDINT_SHARED_DATA)")
    return folder


@pytest.fixture
def covered(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Call it with what was checked; a table of it all ends the run."""
    from tests.common.coverage import Coverage  # here, so that other tests do without the package

    return request.config.stash.setdefault(COVERAGE, Coverage()).add


def pytest_sessionfinish(session: pytest.Session) -> None:
    coverage = session.config.stash.get(COVERAGE, None)
    if coverage is not None and hasattr(session.config, "workeroutput"):
        session.config.workeroutput[SENT] = [tuple(row) for row in coverage.seen]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Joins what pytest-xdist's workers have checked."""
    from tests.common.coverage import Coverage, Row

    if rows := getattr(node, "workeroutput", {}).get(SENT):  # a worker that crashed has none
        node.config.stash.setdefault(COVERAGE, Coverage()).seen.update(Row(*row) for row in rows)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    coverage = config.stash.get(COVERAGE, None)
    if coverage is not None:
        terminalreporter.section("methods covered")
        for line in coverage.table():
            terminalreporter.write_line(line)
