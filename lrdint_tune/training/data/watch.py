"""Files behind memory maps, looked at before they are read: reading a map past its file's end is a signal, no error."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from lrdint_tune.errors import DataLostError
from lrdint_tune.training.pulse import agreed

if TYPE_CHECKING:
    from lrdint_tune.training.data.loader import Batch


class WatchedFiles:
    """Files that stay as long as they are now; for the lifetime of the object, each is held open.

    A file that another process replaces by one of the same name (the same rows, tokenised again) is none of our
    business: the map stays that of the old one. Neither is a content that changes in place.

    Args:
        paths: files that were mapped just now.

    Raises:
        DataLostError: as :meth:`check`.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._held: list[tuple[str, int, int]] = []
        for path in paths:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise _lost(path, error.strerror or str(error)) from error
            self._held.append((path, descriptor, os.fstat(descriptor).st_size))

    def check(self) -> None:
        """Two system calls for each file.

        Raises:
            DataLostError: one is not there any more, cannot be looked at, or is shorter than it was.
        """
        for path, descriptor, size in self._held:
            try:
                os.stat(path)
                now = os.fstat(descriptor).st_size
            except OSError as error:
                raise _lost(path, error.strerror or str(error)) from error
            if now < size:
                raise _lost(path, f"has {now} of {size} bytes")

    def __del__(self) -> None:
        for _, descriptor, _ in getattr(self, "_held", ()):
            os.close(descriptor)


def _lost(path: str, reason: str) -> DataLostError:
    return DataLostError(f"{path}: {reason}, while the run reads it; remove what is left of it and start again")


def raise_everywhere(lost: DataLostError | None) -> None:
    """Raise the error of the first rank that has one; every rank must call it.

    Raises:
        DataLostError: on all ranks, with that rank and its message, unless none has one.
    """
    messages: list[str | None] = [None] * dist.get_world_size()
    own = None if lost is None else f"{lost} (rank {dist.get_rank()}, host {os.uname().nodename})"
    dist.all_gather_object(messages, own)
    first = next((message for message in messages if message is not None), None)
    if first is not None:
        raise DataLostError(first)


def together(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches, each once every rank has its own; all must have equally many. A collective for each.

    Raises:
        DataLostError: on all ranks, when one of them has it instead of a batch.
    """
    while True:
        batch, lost = None, None
        try:
            batch = next(batches, None)
        except DataLostError as error:
            lost = error
        any_lost = torch.tensor(float(lost is not None), device=device)
        dist.all_reduce(any_lost)
        if agreed(any_lost):
            raise_everywhere(lost)
        if batch is None:
            return
        yield batch
