"""Step checkpoints: ``step-N`` folders that are either whole or not there.

A checkpoint is written to ``step-N.partial`` by all ranks (torch.distributed.checkpoint, each its own shards) and
renamed by rank 0 when everyone is done. A rename is atomic, so a kill at any moment leaves the earlier checkpoints as
they were; older ones are removed only after the new one stands.

Frozen pretrained weights are not in it: they are read from ``checkpoint_dir`` again.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lrdint_tune.errors import ConfigError
from lrdint_tune.models.decoder import is_new_tensor
from lrdint_tune.training.schedule import set_rate

log = logging.getLogger(__name__)

STATE_FILE = "train_state.json"
_STEP = re.compile(r"step-(\d+)")


class CheckpointManager:
    """Writes, finds and reads the checkpoints of one run.

    Args:
        folder: where the ``step-N`` folders live.
        keep_last_n: how many to keep.
        is_main: whether this is rank 0, which renames and removes.
    """

    def __init__(self, folder: Path, *, keep_last_n: int, is_main: bool) -> None:
        self.folder = folder
        self.keep_last_n = keep_last_n
        self.is_main = is_main

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [(_STEP.fullmatch(p.name), p) for p in self.folder.iterdir()]
        return sorted(
            int(m.group(1)) for m, p in found if m and (p / STATE_FILE).is_file() and (p / ".metadata").is_file()
        )

    def recover(self) -> None:
        """Clean up after a kill inside a save: remove what never became complete."""
        if not self.folder.is_dir():
            return
        for partial in self.folder.glob("step-*.partial"):
            log.warning("removing %s: a save that never completed", partial.name)
            shutil.rmtree(partial)

    def find(self, resume: str) -> Path | None:
        """The checkpoint to resume from: ``auto`` the latest here, ``never`` none, else the folder named.

        Raises:
            ConfigError: the named folder is no complete checkpoint.
        """
        if resume == "never":
            return None
        if resume == "auto":
            steps = self.steps()
            return self.folder / f"step-{steps[-1]}" if steps else None
        path = Path(resume)
        if not (path / STATE_FILE).is_file() or not (path / ".metadata").is_file():
            raise ConfigError(
                f"resume={resume!r}: not a complete checkpoint ({STATE_FILE} or .metadata missing); give a step-N "
                "folder, auto or never"
            )
        return path

    def set_aside_after(self, step: int) -> None:
        """Move checkpoints of later steps into a folder ``set-aside-K``: training goes on from ``step`` (0: from the
        beginning), and a later ``resume: auto`` must find the new branch."""
        if not self.folder.is_dir():
            return
        numbers = (_STEP.fullmatch(p.name) for p in self.folder.iterdir())  # complete or not: the names are needed
        later = sorted(int(m.group(1)) for m in numbers if m and int(m.group(1)) > step)
        if not later:
            return
        aside = next(p for k in itertools.count(1) if not (p := self.folder / f"set-aside-{k}").exists())
        aside.mkdir()
        for later_step in reversed(later):
            os.rename(self.folder / f"step-{later_step}", aside / f"step-{later_step}")
        log.warning("moved the earlier run's step-%s to %s", ", step-".join(map(str, later)), aside)

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, train_state: dict[str, Any]) -> Path:
        """Write ``step-N``; every rank must call it. Saving reads the model and changes nothing in it."""
        final = self.folder / f"step-{step}"
        partial = self.folder / f"step-{step}.partial"
        if self.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        dcp.save(_tensors(model, optimizer), checkpoint_id=partial)
        torch.save(_rng_state(), partial / f"rng-{dist.get_rank()}.pt")
        dist.barrier()
        if self.is_main:
            _write_synced(partial / STATE_FILE, json.dumps(train_state, indent=1))
            os.rename(partial, final)
            _sync_folder(self.folder)
            for old_step in self.steps()[: -self.keep_last_n]:
                # Under this name a half-removed one is not taken for complete, and recover() removes the rest.
                doomed = self.folder / f"step-{old_step}.partial"
                os.rename(self.folder / f"step-{old_step}", doomed)
                shutil.rmtree(doomed)
        dist.barrier()
        return final

    def check_writable(self) -> None:
        """Write and remove a file: a problem must not show after the last step. Raises ConfigError."""
        probe = self.folder / ".write-test"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"output_dir: cannot write to {self.folder} ({error.strerror}); choose a writable folder"
            ) from None

    @staticmethod
    def dry_run(model: nn.Module, optimizer: Optimizer, train_state: dict[str, Any]) -> None:
        """Put together everything that a save would write, without writing it."""
        json.dumps(train_state)
        _tensors(model, optimizer)

    def load(self, path: Path, model: nn.Module, optimizer: Optimizer) -> None:
        """Fill the trained tensors, the optimizer and the random state from ``path``; any number of ranks may have
        written it.

        Raises:
            ConfigError: the optimizer's state is of another kind, or it is quantised and cannot be cut anew.
        """
        reader = dcp.FileSystemReader(path)
        stored = {key for key in reader.read_metadata().state_dict_metadata if key.startswith("optimizer.")}
        _make_room(model, optimizer, stored)
        state = _tensors(model, optimizer)
        differing = stored ^ {key for key in state if key.startswith("optimizer.")}
        if differing:
            entries = ", ".join(sorted({key.rsplit(".", 1)[1] for key in differing}))
            raise ConfigError(
                f"resume={path}: {entries} of the optimizer's state is either there or kept here, not both; use the "
                "optimizer options of that run, or another output_dir"
            )
        try:
            dcp.load(state, storage_reader=reader)
        except dcp.CheckpointException as error:
            # torchao's quantised state is cut between blocks only.
            if not all(isinstance(cause, ValueError) for cause, _ in error.failures.values()):
                raise
            reason = str(next(iter(error.failures.values()))[0]).split(". ")[0]
            raise ConfigError(
                f"resume={path}: the optimizer's state cannot be spread over {dist.get_world_size()} processes "
                f"({reason}); start as many as wrote it"
            ) from None
        for name, parameter in _named_trained(model).items():
            entry = optimizer.state.get(parameter, {})
            for key in entry:  # what is no tensor is not filled in place
                entry[key] = state[f"optimizer.{name}.{key}"]

    @staticmethod
    def load_rng(path: Path) -> None:
        """Restore this rank's random state; ranks that did not exist when the checkpoint was written keep their own."""
        file = path / f"rng-{dist.get_rank()}.pt"
        if not file.is_file():
            log.warning(
                "%s holds no random state for rank %d: continuing with the current one", path.name, dist.get_rank()
            )
            return
        state = torch.load(file, weights_only=True)
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])

    @staticmethod
    def read_state(path: Path) -> dict[str, Any]:
        """The JSON part of a checkpoint. Raises ConfigError if it is not readable."""
        try:
            return json.loads((path / STATE_FILE).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ConfigError(
                f"resume: {path / STATE_FILE} is not readable ({error}); remove that folder or resume from an "
                "earlier step"
            ) from None


def check_same_run(saved: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    """Refuse to continue a run of another model, method or training setup.

    Raises:
        ConfigError: listing the keys that differ, with both values.
    """
    keys = sorted(set(saved) | set(current))
    differing = [
        f"{key} is {saved.get(key)!r} there and {current.get(key)!r} here"
        for key in keys
        if saved.get(key) != current.get(key)
    ]
    if differing:
        raise ConfigError(
            f"resume={path}: checkpoint of another run: {'; '.join(differing)}; use another output_dir or resume=never"
        )


def _named_trained(model: nn.Module) -> dict[str, Tensor]:
    # After a forward without backward FSDP2 shows the gathered parameters, which the optimizer does not know.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _make_room(model: nn.Module, optimizer: Optimizer, stored: set[str]) -> None:
    """Make the optimizer allocate its state, which it does in its first step, for the parameters that have some in
    ``stored``: only it knows what kinds of tensors it keeps, and where. A gradient of 0 at a learning rate of 0 leaves
    the parameters as they are (those that are trained are about to be loaded anyway)."""
    names = {key.removeprefix("optimizer.").rsplit(".", 1)[0] for key in stored}
    for name, parameter in _named_trained(model).items():
        if name in names:
            parameter.grad = torch.zeros_like(parameter)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        set_rate(group, 0.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        set_rate(group, rate)


def _tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Flat name -> tensor: trained parameters, every new tensor and buffer, and the optimizer's state by parameter
    name."""
    trained = _named_trained(model)
    state: dict[str, Any] = {
        f"model.{name}": tensor for name, tensor in model.state_dict().items() if name in trained or is_new_tensor(name)
    }
    known = 0
    for name, parameter in trained.items():
        known += parameter in optimizer.state
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer.{name}.{key}"] = value
    if known != len(optimizer.state):
        raise RuntimeError(f"the optimizer holds {len(optimizer.state)} parameters but {known} of them have a name")
    return state


def _rng_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
