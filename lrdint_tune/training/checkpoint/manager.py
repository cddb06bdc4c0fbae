"""Saving and loading the checkpoints of a run, by all its ranks together."""

from __future__ import annotations

import json
import logging
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.optim import Optimizer

from lrdint_tune.errors import ConfigError, NotSavedError, UnreachableError
from lrdint_tune.training.checkpoint.folder import CheckpointFolder
from lrdint_tune.training.checkpoint.manifest import (
    STATE_FILE,
    Damage,
    DamagedCheckpoint,
    damage,
    read_manifest,
    write_manifest,
)
from lrdint_tune.training.checkpoint.pieces import PiecewiseSavePlanner
from lrdint_tune.training.checkpoint.state import (
    OPTIMIZER,
    make_room,
    plain_values,
    random_state,
    run_tensors,
    set_plain_values,
    set_random_state,
)
from lrdint_tune.training.checkpoint.storage import CheckpointReader, CheckpointWriter
from lrdint_tune.training.world import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pending:
    """A save that is under way."""

    step: int
    writer: CheckpointWriter
    upload: Future[Any]


class CheckpointManager:
    """Every public method is to be called by all ranks, in the same order.

    A save copies this rank's tensors and returns; a thread writes them and talks to the other ranks' threads over a
    process group of its own (sharing one with the training would mix up their messages).

    Args:
        folder: where the ``step-N`` folders live.
        keep_last_n: how many to keep.
        world: the processes.
        timeout: seconds that a save may take when it is waited for.

    Raises:
        ConfigError: the folder cannot be written to, or another run writes to it.
    """

    def __init__(self, folder: Path, *, keep_last_n: int, world: World, timeout: float) -> None:
        self.world = world
        self.folder = CheckpointFolder(folder, keep_last_n=keep_last_n)
        self.timeout = timeout
        # Longer, so that who is late can still be named.
        self.group = world.side_group(timedelta(seconds=2 * timeout + 60))
        self._pending: _Pending | None = None
        # One rank looks: on a network file system two ranks may see two different latest checkpoints.
        world.on_main(self.folder.claim)
        world.on_main(self.folder.recover)

    # ------------------------------------------------------------------ finding

    def find(
        self, resume: str, check: Callable[[Path, dict[str, Any]], None]
    ) -> tuple[Path, dict[str, Any]] | tuple[None, None]:
        """The checkpoint to resume from and its manifest: ``auto`` the latest good one here, ``never`` none, else the
        folder named.

        Every file is read and compared with its digest, each by one of the ranks. A damaged checkpoint is named and set
        aside, and the one before it is taken.

        Args:
            check: called on rank 0 with a readable manifest before its files are looked at; refuses other runs.

        Raises:
            ConfigError: ``check``'s; the named folder is no complete checkpoint or damaged; there are checkpoints, but
                none is good; the ranks do not see the same files.
        """
        if resume == "never":
            return None, None
        if resume != "auto":
            return self._named(Path(resume), check)
        damaged = []
        for step in reversed(self.world.on_main(self.folder.steps)):
            path = self.folder.of(step)
            manifest, problem = self._examine(path, check)
            if manifest is not None and problem is None:
                return path, manifest
            aside = self.world.on_main(lambda step=step: self.folder.set_aside_damaged(step))  # type: ignore[misc]
            damaged.append(f"step-{step} ({problem})")
            if self.world.is_main:
                log.warning("error: checkpoint step-%d is damaged: %s; moved to %s", step, problem, aside.name)
        if damaged:
            raise ConfigError(
                f"resume='auto': no good checkpoint in {self.folder.path}: {', '.join(damaged)}; restore one, or begin "
                "again with resume=never"
            )
        return None, None

    def _named(self, path: Path, check: Callable[[Path, dict[str, Any]], None]) -> tuple[Path, dict[str, Any]]:
        if self.world.on_main(lambda: not (path / STATE_FILE).is_file()):
            raise ConfigError(
                f"resume={str(path)!r}: not a complete checkpoint (no {STATE_FILE}); give a step-N folder, auto or "
                "never"
            )
        manifest, problem = self._examine(path, check)
        if manifest is None or problem is not None:
            raise ConfigError(f"resume={str(path)!r}: damaged: {problem}; give an earlier step-N folder, auto or never")
        return path, manifest

    def _examine(
        self, path: Path, check: Callable[[Path, dict[str, Any]], None]
    ) -> tuple[dict[str, Any] | None, str | None]:
        """The manifest, and what is wrong with it or with a file."""

        def manifest_or_problem() -> tuple[dict[str, Any] | None, str | None]:
            try:
                manifest = read_manifest(path)
            except DamagedCheckpoint as error:
                return None, str(error)
            check(path, manifest)
            return manifest, None

        manifest, problem = self.world.on_main(manifest_or_problem)
        if manifest is None:
            return None, problem
        files = sorted(manifest["files"].items())[self.world.rank :: self.world.size]
        try:
            report: Any = [found for name, entry in files if (found := damage(path, name, *entry)) is not None]
        except ConfigError as error:
            report = error
        for_each: list[Any] = [None] * self.world.size
        dist.all_gather_object(for_each, (socket.gethostname(), report), group=self.group)
        unreadable = next((report for _, report in for_each if isinstance(report, ConfigError)), None)
        if unreadable is not None:
            raise unreadable
        found_by = [(host, harm) for host, harms in for_each for harm in harms]
        self.world.on_main(lambda: _check_shared(path, found_by))
        return manifest, next((harm.what for _, harm in found_by), None)

    def has(self, step: int) -> bool:
        """Whether there is a checkpoint of that step; one that is being written is waited for."""
        self.finish()
        return self.world.on_main(lambda: step in self.folder.steps())

    def set_aside_after(self, step: int) -> None:
        """See :meth:`CheckpointFolder.set_aside_after`."""
        self.world.on_main(lambda: self.folder.set_aside_after(step))

    # ------------------------------------------------------------------ saving

    def save(
        self, step: int, model: nn.Module, optimizer: Optimizer, train_state: Mapping[str, Any], *, wait: bool
    ) -> None:
        """Write ``step-N``; what is in the tensors now is what is saved, whatever training does to them meanwhile.

        A save that fails (a full disk) leaves the earlier checkpoints as they are. Unless it is waited for, that is
        said and training goes on: the next save may find room.

        Args:
            train_state: what JSON can hold, equal on all ranks.
            wait: return when the checkpoint stands.

        Raises:
            NotSavedError: with ``wait``, when it cannot be written.
        """
        self.finish()
        state = {**run_tensors(model, optimizer), **random_state(self.world.rank)}
        content = {**train_state, "optimizer_values": plain_values(model, optimizer)}
        partial = self.folder.partial(step)

        def publish(digests: dict[str, str]) -> None:
            write_manifest(partial, content, digests)
            self.folder.publish(step)

        writer = CheckpointWriter(partial, publish)
        upload = dcp.async_save(state, storage_writer=writer, planner=PiecewiseSavePlanner(), process_group=self.group)
        self._pending = _Pending(step, writer, cast("Future[Any]", upload))
        if wait:
            problem = self.finish()
            if problem is not None:
                raise NotSavedError(problem)

    def finish(self) -> str | None:
        """Wait for the save that is under way, if there is one; returns what went wrong.

        Raises:
            UnreachableError: ranks do not get to the end of it in time; names them.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        try:
            pending.upload.result(self.timeout)
        except TimeoutError:
            raise UnreachableError(f"checkpoint step-{pending.step}: {self._late(pending.writer)}") from None
        except (dcp.CheckpointException, OSError) as error:
            problem = f"checkpoint step-{pending.step} was not written: {_reason(error)}; {self.standing()}"
            if self.world.is_main:
                shutil.rmtree(self.folder.partial(pending.step), ignore_errors=True)
                log.warning("error: %s", problem)
            return problem
        return None

    def _late(self, writer: CheckpointWriter) -> str:
        parts: list[Any] = [None] * self.world.size
        dist.all_gather_object(parts, (socket.gethostname(), writer.written))  # the save's own group is stuck
        late = [f"rank {rank} on {host}" for rank, (host, written) in enumerate(parts) if not written]
        who = ", ".join(late[:8]) or f"rank 0 on {parts[0][0]}, which gives it its name,"
        return f"{who} did not come to an end in save_timeout_seconds={self.timeout:g}; {self.standing()}"

    def close(self) -> None:
        """Wait for the save that is under way, if there is one, and let another run have the folder."""
        self.finish()
        self.folder.release()

    def standing(self) -> str:
        """Which checkpoint there is to go back to, in words; one that is being written is waited for."""
        self.finish()
        steps = self.folder.steps()
        return f"checkpoint step-{steps[-1]} stands" if steps else "there is no checkpoint yet"

    @staticmethod
    def dry_run(model: nn.Module, optimizer: Optimizer, train_state: Mapping[str, Any]) -> None:
        """Put together everything that a save would write, without writing it."""
        json.dumps({**train_state, **plain_values(model, optimizer)})
        run_tensors(model, optimizer)

    # ------------------------------------------------------------------ loading

    def load(self, path: Path, manifest: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
        """Fill the trained tensors, the optimizer and the random state from a checkpoint that :meth:`find` returned;
        any number of ranks may have written it.

        Ranks that did not exist then keep their random state.

        Raises:
            ConfigError: the optimizer's state is of another kind, or it is quantised and cannot be cut anew.
        """
        reader = CheckpointReader(path)
        stored = {key for key in reader.names if key.startswith(OPTIMIZER)}
        values: dict[str, Any] = manifest["optimizer_values"]
        make_room(model, optimizer, stored | values.keys())
        state = run_tensors(model, optimizer)
        differing = (stored ^ {key for key in state if key.startswith(OPTIMIZER)}) | (
            values.keys() ^ plain_values(model, optimizer).keys()
        )
        if differing:
            entries = ", ".join(sorted({key.rsplit(".", 1)[1] for key in differing}))
            raise ConfigError(
                f"resume={path}: {entries} of the optimizer's state is either there or kept here, not both; use the "
                "optimizer options of that run, or another output_dir"
            )
        random = {name: tensor for name, tensor in random_state(self.world.rank).items() if name in reader.names}
        try:
            dcp.load({**state, **random}, storage_reader=reader, process_group=self.group)
        except dcp.CheckpointException as error:
            # torchao's quantised state is cut between blocks only.
            if not all(isinstance(cause, ValueError) for cause, _ in error.failures.values()):
                raise
            reason = str(next(iter(error.failures.values()))[0]).split(". ")[0]
            raise ConfigError(
                f"resume={path}: the optimizer's state cannot be spread over {self.world.size} processes "
                f"({reason}); start as many as wrote it"
            ) from None
        set_plain_values(model, optimizer, values)
        if random:
            set_random_state(self.world.rank, random)
        else:
            log.warning(
                "%s holds no random state for rank %d: continuing with the current one", path.name, self.world.rank
            )


def _check_shared(path: Path, found_by: Sequence[tuple[str, Damage]]) -> None:
    """Raises ConfigError if another rank misses what this one sees: the checkpoint is whole, but not there for all."""
    for host, harm in found_by:
        if harm.missing and (path / harm.file).exists():
            raise ConfigError(
                f"output_dir: {path / harm.file} is not there on {host}, but on {socket.gethostname()}; use a folder "
                "that all machines share; nothing was changed"
            )


def _reason(error: BaseException) -> str:
    if isinstance(error, dcp.CheckpointException):
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {cause}"
    return str(error)
