"""The folder of a run's checkpoints: which there are, and how they come and go."""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from lrdint_tune.errors import ConfigError
from lrdint_tune.export.atomic import flush

log = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d+)")
LOCK_FILE = ".lock"
# How long a run that is ending, or the orphans of a killed launcher, may still hold the folder.
_LOCK_SECONDS = 60.0


class CheckpointFolder:
    """``step-N`` folders that are either whole or not there. One process, rank 0, changes it.

    A checkpoint is written to ``step-N.partial`` and renamed when every file of it is on the disk. A rename is atomic,
    so a kill at any moment leaves the earlier checkpoints as they were; older ones are removed only after the new one
    stands.

    Args:
        path: the folder.
        keep_last_n: how many checkpoints to keep.
    """

    def __init__(self, path: Path, *, keep_last_n: int) -> None:
        self.path = path
        self.keep_last_n = keep_last_n
        self._lock: int | None = None

    def steps(self) -> list[int]:
        """Steps of the checkpoints, oldest first."""
        if not self.path.is_dir():
            return []
        found = (_STEP.fullmatch(p.name) for p in self.path.iterdir() if p.is_dir())
        return sorted(int(m.group(1)) for m in found if m)

    def of(self, step: int) -> Path:
        """The checkpoint of ``step``."""
        return self.path / f"step-{step}"

    def partial(self, step: int) -> Path:
        """Where it is written."""
        return self.path / f"step-{step}.partial"

    def claim(self, patience: float = _LOCK_SECONDS) -> None:
        """Make the folder, see that it can be written to, and that no other run writes to it, until this process ends.

        Args:
            patience: seconds that another run may take to end.

        Raises:
            ConfigError: it is not writable, or another run does not end.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".write-test"  # a problem must not show after the last step
            probe.write_bytes(b"x")
            probe.unlink()
            self._lock = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"output_dir: cannot write to {self.path} ({error.strerror}); choose a writable folder"
            ) from None
        end = time.monotonic() + patience
        while not _locked(self._lock):
            if time.monotonic() > end:
                holder = os.pread(self._lock, 200, 0).decode(errors="replace") or "unknown"
                os.close(self._lock)
                raise ConfigError(
                    f"output_dir: another run ({holder}) writes to {self.path}; wait for its end or choose another "
                    "output_dir"
                )
            time.sleep(0.2)
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def release(self) -> None:
        """Let another run have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def recover(self) -> None:
        """Clean up after a kill inside a save: remove what never became complete."""
        for partial in self.path.glob("step-*.partial"):
            log.warning("removing %s: a save that never completed", partial.name)
            _remove(partial)

    def publish(self, step: int) -> None:
        """Give the written checkpoint its name, then remove the oldest; the new one stands whether or not these go."""
        os.rename(self.partial(step), self.of(step))
        flush(self.path)
        for old_step in self.steps()[: -self.keep_last_n]:
            # Under this name a half-removed one is not taken for complete, and recover() removes the rest.
            doomed = self.partial(old_step)
            if doomed.exists():  # what could not be removed before
                _remove(doomed)
            try:
                os.rename(self.of(old_step), doomed)
            except OSError as error:
                log.warning("%s stays: it cannot be renamed (%s)", self.of(old_step), error.strerror)
            else:
                _remove(doomed)

    def set_aside_damaged(self, step: int) -> Path:
        """Rename a damaged checkpoint, so that nobody takes it for a good one; what is left of it stays there."""
        names = itertools.chain([f"damaged-step-{step}"], (f"damaged-step-{step}-{k}" for k in itertools.count(2)))
        aside = self._free(names)
        os.rename(self.of(step), aside)
        return aside

    def set_aside_after(self, step: int) -> None:
        """Move checkpoints of later steps into a folder ``set-aside-K``: training goes on from ``step`` (0: from the
        beginning), and a later ``resume: auto`` must find the new branch."""
        later = [found for found in self.steps() if found > step]
        if not later:
            return
        aside = self._free(f"set-aside-{k}" for k in itertools.count(1))
        aside.mkdir()
        for later_step in reversed(later):
            os.rename(self.of(later_step), aside / f"step-{later_step}")
        log.warning("moved the earlier run's step-%s to %s", ", step-".join(map(str, later)), aside)

    def _free(self, names: Iterable[str]) -> Path:
        """The first name that nothing has."""
        return next(path for name in names if not (path := self.path / name).exists())


def _remove(folder: Path) -> None:
    """Remove a folder as far as that goes: on a network file system a file that somebody reads may stay for a while."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        log.warning("%s cannot be removed now; a later start will try again", folder)


def _locked(descriptor: int) -> bool:
    """Whether this process has the lock on the open file now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems have no locks
        log.warning("no protection against a second run with this output_dir: its file system has no locks (%s)", error)
    return True
