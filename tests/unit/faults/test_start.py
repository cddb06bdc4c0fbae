"""Nothing that the harness starts, mounts or builds is left, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lrdint_tune.faults import disk
from lrdint_tune.faults.faults import CutLink, FullDisk, unavailable
from lrdint_tune.faults.network import two_hosts
from lrdint_tune.faults.start import Start

REPOSITORY = Path(__file__).parents[3]
_LACKING = unavailable(CutLink, 2) or unavailable(FullDisk, 2)
needs_root = pytest.mark.skipif(_LACKING is not None, reason=f"mounts and network namespaces: {_LACKING}")

# A launcher with a worker in a session of its own that takes no notice of SIGTERM.
LAUNCHER = ["sh", "-c", "trap '' TERM; RANK=1 setsid sleep 1000 & wait"]

INTERRUPTED = """
import sys, time
from contextlib import ExitStack
from pathlib import Path
from lrdint_tune.faults.__main__ import tidy_up_on_signals
from lrdint_tune.faults.disk import small_disk
from lrdint_tune.faults.faults import CutLink, FullDisk, unavailable
from lrdint_tune.faults.network import two_hosts
from lrdint_tune.faults.start import Start
tidy_up_on_signals()
folder = Path(sys.argv[1])
with ExitStack() as stack:
    network = stack.enter_context(two_hosts(folder))
    stack.enter_context(small_disk(folder / "disk", 1 << 20))
    host = network.hosts[1].command(["sh", "-c", "echo $$; exec sleep 1000"])
    start = stack.enter_context(Start([host], [folder / "log"]))
    while not (folder / "log").read_text():
        time.sleep(0.01)
    print(start.launchers[0].pid, network.hosts[0].namespace, flush=True)
    time.sleep(1000)
"""


def test_orphans_end_too(tmp_path: Path) -> None:
    with Start([LAUNCHER, ["sh", "-c", "exit 75"]], [tmp_path / "a", tmp_path / "b"]) as start:
        while 1 not in start.ranks():
            time.sleep(0.01)
        worker = start.ranks()[1]
        assert not start.wait(0.2)
        start.launchers[0].kill()
        while start.running():
            time.sleep(0.01)
        assert start.members() == [worker], "the worker outlives its launcher"
        assert not start.wait(0.2), "and is waited for"
    assert start.members() == []
    assert start.codes() == [128 + signal.SIGKILL, 75]


@needs_root
def test_a_full_disk(tmp_path: Path) -> None:
    with disk.small_disk(tmp_path / "disk", 1 << 20):
        disk.fill(tmp_path / "disk", leave=10_000)
        free = os.statvfs(tmp_path / "disk")
        assert free.f_bavail * free.f_bsize <= 16_384
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "disk" / "more").write_bytes(bytes(20_000))
        disk.empty(tmp_path / "disk")
        (tmp_path / "disk" / "more").write_bytes(bytes(20_000))
    assert not os.path.ismount(tmp_path / "disk")


@needs_root
def test_two_hosts_reach_each_other_until_the_link_is_cut(tmp_path: Path) -> None:
    connect = "import socket; socket.create_connection(('node-2', 29500), timeout=2); print(socket.gethostname())"
    serve = "import socket, time; s = socket.create_server(('node-2', 29500)); print(1, flush=True); time.sleep(100)"
    with two_hosts(tmp_path) as network:
        first, second = network.hosts

        def reached() -> str:
            command = first.command([sys.executable, "-c", connect])
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()

        with Start([second.command([sys.executable, "-c", serve])], [tmp_path / "log"]):
            while not (tmp_path / "log").read_text():
                time.sleep(0.01)
            assert reached() == "node-1"
            network.cut()
            assert reached() == ""
            network.mend()
            assert reached() == "node-1"
    assert first.namespace not in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout


@needs_root
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_harness_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    harness = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert harness.stdout is not None
    pid, namespace = harness.stdout.readline().split()
    assert os.path.ismount(tmp_path / "disk") and Path(f"/proc/{pid}").exists()
    harness.send_signal(number)
    assert harness.wait(20) == 128 + number
    assert not os.path.ismount(tmp_path / "disk")
    assert not Path(f"/proc/{pid}").exists()
    assert namespace not in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
