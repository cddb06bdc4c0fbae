"""`python -m lrdint_tune.launch` with workers that end in all sorts of ways: its exit code and its few lines."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.integration.kill_ranks import REPOSITORY, environment

pytestmark = pytest.mark.slow

WORKER = str(Path(__file__).with_name("launched.py"))
HOST = socket.gethostname()
LAUNCH = ("-m", "lrdint_tune.launch")
# It gives workers a minute to notice that another node has given up.
IMPATIENT = (
    "-c",
    "import os, sys; os.environ['TORCH_CPP_LOG_LEVEL'] = 'FATAL'; "  # as launch.py does, before torch is imported
    "from lrdint_tune.launching import agent; agent.CLOSED_SECONDS = 2; del os.environ['TORCH_CPP_LOG_LEVEL']; "
    "from lrdint_tune import launch; sys.exit(launch.main())",
)


def _start(*arguments: str, python: Sequence[str] = (), program: Sequence[str] = LAUNCH) -> subprocess.Popen[str]:
    command = [sys.executable, *python, *program, *arguments]
    return subprocess.Popen(
        command, env=environment(), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _lines(output: str) -> list[str]:
    """What the launcher said; nobody printed a traceback."""
    assert "Traceback" not in output, output
    assert "frame #" not in output, output
    return [line for line in output.splitlines() if line.startswith(("launch: ", "error: "))]


@pytest.mark.parametrize(
    ("options", "plan", "code", "lines"),
    [
        ([], ["0=0", "1=0"], 0, []),
        ([], ["0=75", "1=75"], 75, [f"launch: ranks 0, 1 on {HOST}: exit code 75"]),
        (
            ["--max-restarts=2"],  # which a wrong config does not use
            ["0=forever", "1=2"],
            2,
            [f"launch: rank 1 on {HOST}: exit code 2", f"launch: rank 0 on {HOST}: stopped, because of the others"],
        ),
        (
            ["--max-restarts=2"],
            ["0.0=forever", "1.0=killed", "0.1=0", "1.1=0"],
            0,
            [
                f"launch: rank 1 on {HOST}: killed by SIGKILL",
                f"launch: rank 0 on {HOST}: stopped, because of the others",
                "launch: the workers are started again (restarts left: 1)",
            ],
        ),
        (
            [],
            ["0=forever", "1=killed"],
            137,
            [
                f"launch: rank 1 on {HOST}: killed by SIGKILL",
                f"launch: rank 0 on {HOST}: stopped, because of the others",
            ],
        ),
    ],
    ids=["done", "saved", "bad input", "restarted", "killed"],
)
def test_ends_with_the_code_of_the_first_to_fail(
    options: Sequence[str], plan: Sequence[str], code: int, lines: list[str]
) -> None:
    job = _start("--nproc_per_node=2", *options, WORKER, *plan)
    output, _ = job.communicate(timeout=60)
    if plan == ["0=75", "1=75"]:  # one may have been told to stop before it was seen
        assert _lines(output)[0].startswith("launch: rank")
    else:
        assert _lines(output) == lines
    assert job.returncode == code


def _signalled(plan: Sequence[str], signals: Sequence[signal.Signals], pause: float) -> tuple[int, str]:
    """Exit code and output with ``signals`` to the launcher, ``pause`` seconds apart, once there are workers."""
    job = _start("--nproc_per_node=2", WORKER, *plan)
    assert job.stdout is not None
    for _ in range(2):
        assert job.stdout.readline().startswith("started ")
    for number in signals:
        job.send_signal(number)
        time.sleep(pause)
    output, _ = job.communicate(timeout=60)
    return job.returncode, output


@pytest.mark.parametrize(
    ("plan", "signals", "code", "last"),
    [
        (["0=saving", "1=saving"], [signal.SIGUSR1], 75, "launch: ranks 0, 1: exit code 75 after SIGUSR1"),
        (["0=forever", "1=forever"], [signal.SIGTERM], 75, "launch: ranks 0, 1: exit code 75 after SIGTERM"),
        (
            ["0=saving", "1=saving", "seconds=2"],
            [signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1],
            75,
            "launch: ranks 0, 1: exit code 75 after SIGTERM",
        ),
    ],
    ids=["saved", "nothing to save", "repeated"],
)
def test_signals(plan: Sequence[str], signals: Sequence[signal.Signals], code: int, last: str) -> None:
    ended, output = _signalled(plan, signals, pause=0.3)
    assert ended == code, output
    assert _lines(output)[-1] == last


@pytest.mark.parametrize(
    "plan",
    [["0=saving", "1=saving"], ["0=saving", "1=deaf", "window=1.8"]],
    ids=["ends the workers", "is repeated, then SIGKILL"],
)
def test_second_signal(plan: Sequence[str]) -> None:
    """Workers end by themselves, also one that got the first signal late, so that this one seems to be the same."""
    plan = [*plan, "seconds=60"]
    code, output = _signalled(plan, [signal.SIGTERM, signal.SIGINT], pause=1.3)
    assert code == 130, output
    assert "at once 0\n" in output
    assert _lines(output)[-1] == "launch: SIGINT, the second signal: ended at once"


def test_workers_are_told_though_nobody_reads() -> None:
    """``| tee`` has ended."""
    job = _start("--nproc_per_node=1", WORKER, "0=saving")
    assert job.stdout is not None
    assert job.stdout.readline() == "started 0\n"
    job.stdout.close()
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == 75


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)], ids=["TERM", "USR1", "INT"]
)
def test_signal_while_torch_is_imported(number: signal.Signals, code: int) -> None:
    job = _start(WORKER, "0=0", python=["-X", "importtime"])  # it prints each module that is imported
    assert job.stdout is not None
    for line in job.stdout:
        if re.search(r"\| +torch\.", line):
            break
    job.send_signal(number)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == code, output
    assert _lines(output) == [f"launch: {number.name} before there were workers: nothing to save"]
    assert "lrdint_tune.launching.run\n" not in output  # which was yet to be imported


def _two_nodes(*arguments: str) -> list[tuple[int, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    options = ["--nnodes=2", f"--rdzv_endpoint={endpoint}", "--rdzv_conf=join_timeout=30,close_timeout=5"]
    nodes = [_start(*options, *arguments, program=IMPATIENT) for _ in range(2)]
    outputs = [node.communicate(timeout=90)[0] for node in nodes]
    return [(node.returncode, output) for node, output in zip(nodes, outputs, strict=True)]


def test_two_nodes_end_together() -> None:
    """Rank 0's node holds the store and leaves; the other's worker would run for ten minutes."""
    ends = _two_nodes(WORKER, "0=3", "1=forever")
    assert sorted(code for code, _ in ends) == [3, 6]
    lost = next(_lines(output) for code, output in ends if code == 6)
    assert lost[-1].startswith("error: the other nodes ended or cannot be reached at localhost:")


def test_missing_node_is_reported() -> None:
    options = ["--nnodes=2", "--rdzv_endpoint=localhost:0", "--rdzv_conf=join_timeout=2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        options[1] = f"--rdzv_endpoint=localhost:{free.getsockname()[1]}"
    job = _start(*options, WORKER, "0=0")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 6
    assert re.fullmatch(
        r"error: 1 of 2 nodes came to localhost:\d+ in 2 s: \S+; start the others with the same .*", _lines(output)[0]
    )


def test_many_nodes_without_an_endpoint_are_refused() -> None:
    job = _start("--nnodes=2", WORKER, "0=0")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    assert output.splitlines() == _lines(output)
    assert "--rdzv_endpoint, which is missing" in output
