"""Guards the checkpoints of a run: one that was published may go only by pruning, or because it was damaged."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

from lrdint_tune.faults.record import published

_INTERVAL_SECONDS = 0.02


class CheckpointWatch:
    """Looks at a folder of checkpoints all the time, as a context manager.

    Args:
        folder: where the ``step-N`` folders live; it need not exist yet.
        keep_last_n: how many newer ones must stand before one may be removed.
    """

    def __init__(self, folder: Path, keep_last_n: int) -> None:
        self.folder = folder
        self.keep_last_n = keep_last_n
        self.lost: list[str] = []
        self._digests: dict[int, str | None] = {}
        self._damaged: set[tuple[int, int]] = set()  # steps, and which folder of that name
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> CheckpointWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def damaged(self, step: int) -> None:
        """``step-N`` is about to be damaged on purpose: what becomes of this folder is no loss; a later one with its
        name counts again."""
        with self._lock:
            self._look()
            self._digests.pop(step, None)
            self._damaged.add((step, (self.folder / f"step-{step}").stat().st_ino))

    def check(self) -> None:
        """Compare every checkpoint with what was published. Nothing may be writing."""
        with self._lock:
            self._look()
            for step, before in self._digests.items():
                now = _digest(self.folder / f"step-{step}")
                if before is not None and now != before:
                    self.lost.append(f"step-{step} changed after it was published")
                self._digests[step] = now

    def _run(self) -> None:
        while not self._over.wait(_INTERVAL_SECONDS):
            with self._lock:
                self._look()

    def _look(self) -> None:
        there = {step: path for step, path in published(self.folder).items() if not self._is_damaged(step, path)}
        for step in [step for step in self._digests if step not in there]:
            newer = [other for other in there if other > step]
            if len(newer) < self.keep_last_n:
                self.lost.append(f"step-{step} vanished with {len(newer)} newer ones there")
            del self._digests[step]
        for step, path in there.items():
            if self._digests.get(step) is None:
                self._digests[step] = _digest(path)

    def _is_damaged(self, step: int, path: Path) -> bool:
        if not self._damaged:
            return False
        try:
            return (step, path.stat().st_ino) in self._damaged
        except OSError:  # renamed meanwhile
            return True


def _digest(folder: Path) -> str | None:
    """Of all names and contents; None when files go while they are read."""
    total = hashlib.blake2b()
    try:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            content = hashlib.blake2b()
            with open(file, "rb") as stream:
                while block := stream.read(1 << 20):
                    content.update(block)
            total.update(str(file.relative_to(folder)).encode() + b"\0" + content.digest())
    except OSError:
        return None
    return total.hexdigest()
