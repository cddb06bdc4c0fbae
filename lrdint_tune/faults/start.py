"""Starting a run as a user would, and ending every process of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL
from types import TracebackType

from lrdint_tune.faults import processes
from lrdint_tune.faults.network import PORT, Network
from lrdint_tune.faults.record import said

RECIPE = "lrdint_tune.full_finetune_distributed"
TORCHRUN = "torch.distributed.run"
_TAG = "LRDINT_TUNE_FAULTS"


@dataclass(frozen=True)
class Launch:
    """What is started.

    Attributes:
        module: the launcher, ``torch.distributed.run`` or one that takes its options.
        world_size: number of ranks; over two hosts, half of them on each.
        overrides: ``key=value`` arguments after the config.
    """

    module: str
    config: Path
    world_size: int
    overrides: tuple[str, ...] = ()

    def commands(self, output_dir: Path, network: Network | None = None) -> list[list[str]]:
        """One command for each host."""
        recipe = ["-m", RECIPE, "--config", str(self.config), *self.overrides, f"output_dir={output_dir}"]
        launcher = [sys.executable, "-m", self.module]
        if self.module == TORCHRUN:  # by itself it dies of SIGUSR1 and leaves its ranks behind
            launcher.append("--signals-to-handle=SIGTERM,SIGINT,SIGUSR1")
        if network is None:
            return [[*launcher, "--standalone", f"--nproc_per_node={self.world_size}", *recipe]]
        endpoint = f"{network.hosts[0].address}:{PORT}"
        launcher += ["--nnodes=2", f"--nproc_per_node={self.world_size // 2}"]
        launcher += ["--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}", "--rdzv_id=faults"]
        return [host.command([*launcher, *recipe]) for host in network.hosts]


class Start:
    """One start of a run; as a context manager it leaves no process behind.

    Args:
        commands: a launcher for each host.
        logs: where each of them writes.
    """

    def __init__(self, commands: list[list[str]], logs: list[Path]) -> None:
        self.logs = logs
        self._tag = uuid.uuid4().hex
        # One thread a rank: the same sums whatever else the machine does, and no quarrel over few cores.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", _TAG: self._tag}
        self.launchers: list[subprocess.Popen[bytes]] = []
        self._environment, self._commands = environment, commands

    def __enter__(self) -> Start:
        for command, log in zip(self._commands, self.logs, strict=True):
            with open(log, "wb") as out:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    env=self._environment,
                    start_new_session=True,  # Ctrl-C is for the harness
                )
            self.launchers.append(process)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    def members(self) -> list[int]:
        """Every living process of this start."""
        return list(processes.with_variable(_TAG, self._tag))

    def ranks(self) -> dict[int, int]:
        """Rank -> process id."""
        return processes.ranks_of(*(launcher.pid for launcher in self.launchers))

    def running(self) -> bool:
        """Whether a launcher is alive; orphans do not count."""
        return any(launcher.poll() is None for launcher in self.launchers)

    def wait(self, seconds: float) -> bool:
        """Whether everything ended in that time, processes that outlive their launcher included."""
        end = time.monotonic() + seconds
        while self.running() or self.members():
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def codes(self) -> list[int]:
        """The launchers' exit codes, as a shell shows them: 128 + n for signal n."""
        return [code if (code := launcher.wait()) >= 0 else 128 - code for launcher in self.launchers]

    def lines(self) -> list[list[str]]:
        """All that was said, host by host."""
        return [said(log) for log in self.logs]

    def kill(self) -> None:
        """SIGKILL to everything, launchers first: none is left to say or to tidy up anything."""
        for launcher in self.launchers:
            launcher.kill()
        while members := self.members():
            processes.send(members, SIGKILL)
            time.sleep(0.02)
        for launcher in self.launchers:
            launcher.wait()
