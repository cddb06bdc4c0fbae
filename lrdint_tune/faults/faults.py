"""The faults, one class each: what is done to a running job, and how the job has to end."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from signal import SIGCONT, SIGINT, SIGKILL, SIGSTOP, SIGTERM, SIGUSR1
from tempfile import TemporaryDirectory
from typing import ClassVar

from lrdint_tune.exit_codes import DATA_LOST, DONE, INTERRUPTED, LOST_RANK, NOT_SAVED, PREEMPTED
from lrdint_tune.faults import disk, processes
from lrdint_tune.faults.network import Network, two_hosts
from lrdint_tune.faults.record import published
from lrdint_tune.faults.start import Start
from lrdint_tune.faults.tools import ToolFailed
from lrdint_tune.faults.watch import CheckpointWatch

POLL_SECONDS = 0.01
KILLED = 128 + SIGKILL


class Missed(Exception):
    """The fault could not be made; the message says why."""


@dataclass(frozen=True)
class Scene:
    """What a fault finds.

    Attributes:
        start: the processes.
        draw: for everything that is left to chance.
        checkpoint_bytes: the size of a checkpoint of this run.
        network: the two hosts, for faults that ask for them.
    """

    start: Start
    output_dir: Path
    watch: CheckpointWatch
    draw: random.Random
    checkpoint_bytes: int
    network: Network | None = None

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for it. Raises Missed if the run ends before."""
        while not condition():
            if not self.start.running():
                raise Missed("the run was over before it")
            time.sleep(POLL_SECONDS)

    def rank(self) -> tuple[int, int]:
        """A random rank and its process id."""
        ranks = self.start.ranks()
        if not ranks:
            raise Missed("the ranks were gone before it")
        rank = self.draw.choice(sorted(ranks))
        return rank, ranks[rank]


class Fault(ABC):
    """A way to disturb a run.

    Attributes:
        codes: how the launcher may end.
        says: what the disturbed start, or the one after it, has to say on every host: a regular expression.
        two_hosts: the run is spread over two.
        loses_steps: whether steps may have to be made again.
        checkpoints: how many must stand before.
    """

    name: ClassVar[str]
    codes: ClassVar[frozenset[int]]
    says: ClassVar[str]
    two_hosts: ClassVar[bool] = False
    loses_steps: ClassVar[bool] = True
    checkpoints: ClassVar[int] = 0

    def around(self, output_dir: Path, checkpoint_bytes: int, draw: random.Random) -> AbstractContextManager[None]:
        """What must be there before the run starts and until it is over."""
        return nullcontext()

    @abstractmethod
    def inject(self, scene: Scene) -> str:
        """Make the fault; returns a few words on what was done. Raises Missed."""

    def repair(self, scene: Scene) -> None:  # noqa: B027  # most leave nothing to repair
        """What an operator does before starting the run again."""


class KillRank(Fault):
    name = "kill -9 of a rank"
    codes = frozenset({KILLED, LOST_RANK})
    says = r"lost rank \d+ on \S+:|rank \d+ on \S+: killed by SIGKILL"

    def inject(self, scene: Scene) -> str:
        rank, pid = scene.rank()
        processes.send([pid], SIGKILL)
        return f"rank {rank}"


class KillLauncher(Fault):
    name = "kill -9 of the launcher"
    codes = frozenset({KILLED})
    says = r"launcher of rank \d+ on \S+ is dead"

    def inject(self, scene: Scene) -> str:
        scene.start.launchers[0].kill()
        return "its ranks live on"


class _Signal(Fault):
    number: ClassVar[signal.Signals]
    says = r"^SIG(TERM|USR1|INT): "
    loses_steps = False

    def inject(self, scene: Scene) -> str:
        scene.start.launchers[0].send_signal(self.number)
        return "to the launcher"


class Terminate(_Signal):
    name = "SIGTERM"
    number = SIGTERM
    codes = frozenset({PREEMPTED})


class UserSignal(_Signal):
    name = "SIGUSR1"
    number = SIGUSR1
    codes = frozenset({PREEMPTED})


class Interrupt(_Signal):
    name = "SIGINT (Ctrl-C)"
    number = SIGINT
    codes = frozenset({INTERRUPTED})


class TerminateTwice(_Signal):
    name = "SIGTERM, and again"
    number = SIGTERM
    codes = frozenset({128 + SIGTERM, PREEMPTED})  # the second may come when all is saved
    loses_steps = True

    def inject(self, scene: Scene) -> str:
        super().inject(scene)
        pause = scene.draw.uniform(0.0, 1.5)  # the ranks take what comes within a second for the same one
        time.sleep(pause)
        super().inject(scene)
        return f"{pause * 1000:.0f} ms between them"


class Freeze(Fault):
    name = "SIGSTOP of a rank"
    codes = frozenset({LOST_RANK})
    says = r"lost rank \d+ on \S+:"

    def inject(self, scene: Scene) -> str:
        rank, pid = scene.rank()
        processes.send([pid], SIGSTOP)
        return f"rank {rank} hangs"


class KillInSave(Fault):
    name = "kill -9 inside a save"
    codes = frozenset({KILLED, LOST_RANK})
    says = r"lost rank \d+ on \S+:|rank \d+ on \S+: killed by SIGKILL"

    def inject(self, scene: Scene) -> str:
        while True:
            scene.until(lambda: _unfinished(scene.output_dir) is not None)
            time.sleep(scene.draw.uniform(0.0, 0.02))
            ranks = scene.start.ranks()
            # Frozen, they show whether the save is still going on.
            processes.send(ranks.values(), SIGSTOP)
            unfinished = _unfinished(scene.output_dir)
            if unfinished is not None and ranks:
                break
            processes.send(ranks.values(), SIGCONT)
        rank = scene.draw.choice(sorted(ranks))
        processes.send([ranks[rank]], SIGKILL)
        processes.send(ranks.values(), SIGCONT)
        return f"rank {rank}, in {unfinished}"


class _Damage(Fault):
    """The machine is reset, and a shard of the latest checkpoint does not survive it."""

    codes = frozenset({KILLED})
    says = r"step-\d+ is damaged"
    checkpoints = 2

    def inject(self, scene: Scene) -> str:
        scene.start.kill()
        step, folder = list(published(scene.output_dir / "checkpoints").items())[-1]
        scene.watch.damaged(step)
        shard = scene.draw.choice(sorted(folder.glob("*.distcp")))
        return f"step-{step}/{shard.name}: {self.damage(shard, scene.draw)}"

    @abstractmethod
    def damage(self, shard: Path, draw: random.Random) -> str:
        """Damage a file; returns what was done."""


class Truncate(_Damage):
    name = "truncated shard"

    def damage(self, shard: Path, draw: random.Random) -> str:
        size = shard.stat().st_size
        kept = draw.randrange(size)
        os.truncate(shard, kept)
        return f"{kept} of {size} bytes kept"


class FlipBit(_Damage):
    name = "bit-flipped shard"

    def damage(self, shard: Path, draw: random.Random) -> str:
        position, bit = draw.randrange(shard.stat().st_size), draw.randrange(8)
        with open(shard, "r+b") as file:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ 1 << bit]))
        return f"bit {bit} of byte {position}"


class Remove(_Damage):
    name = "missing shard"

    def damage(self, shard: Path, draw: random.Random) -> str:
        shard.unlink()
        return "removed"


class _FullDisk(Fault):
    """The disk is full in the middle of the run."""

    says = r"error: checkpoint step-\d+ was not written"
    folder: ClassVar[str] = "checkpoints"

    @contextmanager
    def around(self, output_dir: Path, checkpoint_bytes: int, draw: random.Random) -> Iterator[None]:
        with disk.small_disk(output_dir / self.folder, 8 * checkpoint_bytes + (4 << 20)):
            yield

    def inject(self, scene: Scene) -> str:
        leave = scene.draw.randrange(scene.checkpoint_bytes)
        disk.fill(scene.output_dir / self.folder, leave)
        return f"{self.folder}: {leave} bytes left, a checkpoint takes {scene.checkpoint_bytes}"

    def repair(self, scene: Scene) -> None:
        disk.empty(scene.output_dir / self.folder)


class FullDisk(_FullDisk):
    name = "disk full to the end"
    codes = frozenset({NOT_SAVED})


class FullDiskForAWhile(_FullDisk):
    name = "disk full for a while"
    codes = frozenset({DONE, NOT_SAVED})  # the last save may begin before there is room again

    def inject(self, scene: Scene) -> str:
        done = super().inject(scene)
        scene.until(lambda: any(re.search(self.says, line) for line in scene.start.lines()[0]))
        self.repair(scene)
        return done


class FullOutputDisk(_FullDisk):
    name = "disk full, logs and results too"
    codes = frozenset({NOT_SAVED})
    folder = "."


class LoseData(Fault):
    """A file of the data goes while it is read, and is there again for the next start."""

    name = "data file vanishes"
    codes = frozenset({DATA_LOST})
    says = r"error: \S+\.arrow: "
    loses_steps = False

    def inject(self, scene: Scene) -> str:
        rank, pid = scene.rank()
        files = processes.mapped(pid, ".arrow")
        if not files:
            raise Missed(f"rank {rank} has no Arrow file mapped")
        self.file = scene.draw.choice(files)
        self.file.rename(self._away)
        return self.file.name

    def repair(self, scene: Scene) -> None:
        self._away.rename(self.file)

    @property
    def _away(self) -> Path:
        return self.file.with_name(f"{self.file.name}.away")


class CutLink(Fault):
    name = "link between two hosts cut"
    codes = frozenset({LOST_RANK})
    says = r"lost rank \d+"
    two_hosts = True

    def inject(self, scene: Scene) -> str:
        assert scene.network is not None
        scene.network.cut()
        return "node-1 | node-2"

    def repair(self, scene: Scene) -> None:
        assert scene.network is not None
        scene.network.mend()


def _unfinished(output_dir: Path) -> str | None:
    """The name of a checkpoint that is being written."""
    return next((path.name for path in (output_dir / "checkpoints").glob("step-*.partial")), None)


FAULTS: tuple[type[Fault], ...] = (
    KillRank,
    KillLauncher,
    Terminate,
    UserSignal,
    Interrupt,
    TerminateTwice,
    Freeze,
    KillInSave,
    Truncate,
    FlipBit,
    Remove,
    FullDisk,
    FullDiskForAWhile,
    FullOutputDisk,
    LoseData,
    CutLink,
)


def unavailable(fault: type[Fault], world_size: int) -> str | None:
    """Why a fault cannot be made here, or None: what it needs is made once for a try."""
    if fault.two_hosts and world_size % 2:
        return "needs an even number of ranks"
    if not fault.two_hosts and not issubclass(fault, _FullDisk):
        return None
    if os.geteuid() != 0:
        return "needs root"
    with TemporaryDirectory() as folder:  # in a container root may not do everything
        try:
            with two_hosts(Path(folder)) if fault.two_hosts else disk.small_disk(Path(folder, "disk"), 1 << 20):
                return None
        except ToolFailed as error:
            return str(error)
