"""Saving, finding and loading; resuming whole runs is tested in tests/integration."""

import errno
import json
import os
import pickle
import re
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit

from lrdint_tune.errors import ConfigError, NotSavedError, UnreachableError
from lrdint_tune.training.checkpoint import manifest as manifest_module
from lrdint_tune.training.checkpoint.manager import CheckpointManager
from lrdint_tune.training.checkpoint.manifest import STATE_FILE
from lrdint_tune.training.checkpoint.state import run_tensors
from lrdint_tune.training.checkpoint.storage import CheckpointReader, CheckpointWriter
from lrdint_tune.training.world import MeshShape, World, make_world
from tests.distributed.harness import run_ranks, start_ranks
from tests.unit.training.checkpoint.test_manifest import flip


def world() -> World:
    return make_world(torch.device("cpu"), MeshShape(1, dist.get_world_size()))


@contextmanager
def manager(folder: Path, keep: int = 2, timeout: float = 60) -> Iterator[CheckpointManager]:
    checkpoints = CheckpointManager(folder, keep_last_n=keep, world=world(), timeout=timeout)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def accept(path: Path, manifest: dict[str, Any]) -> None:
    """Every run may go on with any checkpoint."""


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, resume: str = "auto") -> dict[str, Any]:
    """Into ``model`` and ``optimizer``; returns the manifest."""
    with manager(folder) as checkpoints:
        path, manifest = checkpoints.find(resume, accept)
        assert path is not None and manifest is not None
        checkpoints.load(path, manifest, model, optimizer)
    return manifest


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    loss = (model(torch.randn(3, 4)) ** 2).sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


def _round_trip(folder: Path, cls: str, options: dict[str, Any]) -> None:
    """Three steps, a save, two more steps; then the two again from the save, in a new model and optimizer."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        model.get_parameter("0.bias").requires_grad_(False)
        return model, getattr(torch.optim, cls)([p for p in model.parameters() if p.requires_grad], **options)

    model, optimizer = build()
    frozen = model.get_parameter("0.bias").clone()
    with manager(folder, keep=2) as checkpoints:
        for step in range(1, 4):
            _step(model, optimizer)
            checkpoints.save(step, model, optimizer, {"step": step}, wait=False)
        expected = [_step(model, optimizer) for _ in range(2)]  # while the last save is under way
    assert checkpoints.folder.steps() == [2, 3]

    other, its_optimizer = build()
    with torch.no_grad():
        other.get_parameter("0.bias").copy_(frozen)  # not in the checkpoint
    assert load(folder, other, its_optimizer)["step"] == 3
    assert [_step(other, its_optimizer) for _ in range(2)] == expected


@pytest.mark.parametrize(
    ("cls", "options"),
    [("AdamW", {"lr": 0.1}), ("AdamW", {"lr": 0.1, "fused": True}), ("SGD", {"lr": 0.1, "momentum": 0.9}), ("SGD", {})],
    ids=str,
)
def test_round_trip(tmp_path: Path, cls: str, options: dict[str, Any]) -> None:
    """Parameters, optimizer state of any kind, and the random numbers drawn afterwards."""
    run_ranks(_round_trip, 1, tmp_path, cls, options)


@pytest.mark.parametrize("options", [{}, {"foreach": True, "capturable": False}], ids=str)
def test_loading_makes_no_step(tmp_path: Path, options: dict[str, Any]) -> None:
    """Room for the state is made by the optimizer; neither frozen nor trained parameters nor rates move by it, and
    who had no state has none."""
    assert run_ranks(_load_into_other_rates, 1, tmp_path, options) == ["kept"]


def _load_into_other_rates(folder: Path, options: dict[str, Any]) -> str:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
    model.get_parameter("1.weight").grad = torch.ones(1, 4)
    optimizer.step()
    optimizer.zero_grad()
    with manager(folder) as checkpoints:
        checkpoints.save(1, model, optimizer, {}, wait=True)
    saved = {name: p.clone() for name, p in model.named_parameters()}
    other = torch.optim.AdamW(model.parameters(), lr=0.7, weight_decay=0.5, **options)
    load(folder, model, other)
    assert all(torch.equal(p, saved[name]) for name, p in model.named_parameters())
    assert other.param_groups[0]["lr"] == 0.7
    assert list(other.state) == [model.get_parameter("1.weight")]
    for key, value in optimizer.state[model.get_parameter("1.weight")].items():
        assert torch.equal(other.state[model.get_parameter("1.weight")][key], value)
    assert all(p.grad is None for p in model.parameters())
    return "kept"


def _sharded_eight_bit(rows: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.compiler.set_stance("force_eager")
    torch.manual_seed(0)
    model = nn.Linear(96, rows, bias=False)
    fully_shard(model, mesh=world().mesh["shard"])
    return model, AdamW8bit(model.parameters(), lr=0.1)


def _save_eight_bit(folder: Path, *sizes: int) -> None:
    for rows in sizes:
        model, optimizer = _sharded_eight_bit(rows)
        model(torch.randn(3, 96)).sum().backward()
        optimizer.step()
        with manager(folder) as checkpoints:
            checkpoints.save(rows, model, optimizer, {}, wait=True)


def _load_eight_bit(folder: Path, *sizes: int) -> list[str]:
    outcomes = []
    for rows in sizes:
        model, optimizer = _sharded_eight_bit(rows)
        try:
            load(folder, model, optimizer, str(folder / f"step-{rows}"))
            outcomes.append("loaded")
        except ConfigError as error:
            outcomes.append(str(error))
    return outcomes


def test_eight_bit_state_is_cut_between_blocks_only(tmp_path: Path) -> None:
    """56 rows of 96 are 21 blocks of 256, and half of them are ten and a half. Halves of 64 rows are 12 blocks, though
    too small to be quantised."""
    run_ranks(_save_eight_bit, 1, tmp_path, 56, 64)
    for message, other in run_ranks(_load_eight_bit, 2, tmp_path, 56, 64):
        assert message.startswith("resume=") and "\n" not in message
        assert "over 2 processes" in message and "block_size=256" in message and "as many as wrote it" in message
        assert other == "loaded"


def _save_on(folder: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    with manager(folder) as checkpoints:
        checkpoints.save(1, model, optimizer, {}, wait=True)


def _random_state_kept(folder: Path) -> bool:
    model = nn.Linear(2, 2)
    torch.manual_seed(5 + dist.get_rank())
    before = torch.get_rng_state()
    load(folder, model, torch.optim.SGD(model.parameters()))
    return torch.equal(torch.get_rng_state(), before)


def test_rank_that_did_not_exist_keeps_its_random_state(tmp_path: Path) -> None:
    run_ranks(_save_on, 1, tmp_path)
    assert run_ranks(_random_state_kept, 2, tmp_path) == [False, True]


# ---------------------------------------------------------------------------------------------- damage and failure


def _save_steps(folder: Path, *steps: int) -> None:
    model, optimizer = _sharded()
    with manager(folder, keep=9) as checkpoints:
        for step in steps:
            model(torch.ones(1, 8)).sum().backward()
            optimizer.step()
            checkpoints.save(step, model, optimizer, {"step": step}, wait=False)


def _sharded() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(8, 6)
    fully_shard(model, mesh=world().mesh["shard"])
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def _find(folder: Path, resume: str) -> tuple[str | None, str | None]:
    """Name of what is found, or the refusal."""
    with manager(folder, keep=9) as checkpoints:
        try:
            path, _ = checkpoints.find(resume, accept)
        except ConfigError as error:
            return None, str(error)
    return None if path is None else path.name, None


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


HARM: list[tuple[str, Callable[[Path], object], str]] = [
    ("__1_0.distcp", truncate, "__1_0.distcp has "),
    ("__1_0.distcp", Path.unlink, "__1_0.distcp is missing"),
    ("__0_0.distcp", lambda file: flip(file, 700), "__0_0.distcp: its content differs"),
    (".metadata", lambda file: flip(file, 99), ".metadata: its content differs"),
    (".metadata", Path.unlink, ".metadata is missing"),
    ("train_state.json", truncate, "train_state.json is not readable"),
    ("train_state.json", Path.unlink, "train_state.json is missing"),
]


@pytest.mark.parametrize(("file", "harm", "what"), HARM, ids=[f"{file}, {what[-14:]}" for file, _, what in HARM])
def test_the_previous_good_checkpoint_is_used(
    tmp_path: Path, file: str, harm: Callable[[Path], object], what: str
) -> None:
    run_ranks(_save_steps, 2, tmp_path, 3, 6, 9)
    harm(tmp_path / "step-9" / file)
    harm(tmp_path / "step-6" / file)
    outcome = start_ranks(_find, 2, tmp_path, "auto")
    assert outcome.results == [("step-3", None)] * 2
    assert f"error: checkpoint step-9 is damaged: {what}" in outcome.outputs[0]
    assert "moved to damaged-step-9" in outcome.outputs[0]
    left = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert left == ["damaged-step-6", "damaged-step-9", "step-3"]


def test_no_good_checkpoint_is_left(tmp_path: Path) -> None:
    """Beginning again in silence would hide the loss of the whole run."""
    run_ranks(_save_steps, 1, tmp_path, 3, 6)
    for step in (3, 6):
        flip(tmp_path / f"step-{step}" / "__0_0.distcp", 500)
    ((name, message),) = run_ranks(_find, 1, tmp_path, "auto")
    assert name is None and message is not None
    assert "no good checkpoint" in message and "step-3 (__0_0" in message and "resume=never" in message
    assert run_ranks(_find, 1, tmp_path, "never") == [(None, None)]


def test_named_checkpoint(tmp_path: Path) -> None:
    run_ranks(_save_steps, 1, tmp_path, 3, 6)
    assert run_ranks(_find, 1, tmp_path / "other", str(tmp_path / "step-3")) == [("step-3", None)]
    assert run_ranks(_find, 1, tmp_path / "other", "auto") == [(None, None)]
    truncate(tmp_path / "step-3" / "__0_0.distcp")
    ((_, message),) = run_ranks(_find, 1, tmp_path / "other", str(tmp_path / "step-3"))
    assert message is not None and "damaged: __0_0.distcp has" in message and "auto or never" in message
    assert (tmp_path / "step-3").is_dir(), "what was named is not moved"
    ((_, message),) = run_ranks(_find, 1, tmp_path, str(tmp_path / "step-4"))
    assert message is not None and "step-4': not a complete checkpoint" in message


def _find_with(folder: Path, host: str, change: Callable[[], None]) -> str | None:
    """As ``_find``, with another machine's eyes on rank 1: ``change`` comes before it looks."""
    if dist.get_rank() == 1:
        socket.gethostname = lambda: host  # type: ignore[assignment]
        change()
    return _find(folder, "auto")[1]


def _unreadable() -> None:
    def read(file: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    manifest_module.digest_of = read


def _blind() -> None:
    original = Path.stat

    def stat(self: Path, **options: Any) -> os.stat_result:
        if self.name == "__0_0.distcp":
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return original(self, **options)

    Path.stat = stat  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_unreadable, r"cannot be read on other \(Input/output error\); nothing was changed"),
        (_blind, r"__0_0.distcp is not there on other, but on .*; use a folder that all machines share"),
    ],
    ids=["unreadable", "not shared"],
)
def test_what_one_machine_cannot_read_is_not_taken_for_damaged(
    tmp_path: Path, change: Callable[[], None], what: str
) -> None:
    run_ranks(_save_steps, 2, tmp_path, 3, 6)
    for message in run_ranks(_find_with, 2, tmp_path, "other", change):
        assert message is not None and re.search(what, message)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["step-3", "step-6"]


@pytest.mark.parametrize(
    ("content", "what"),
    [({"step": 3, "run": {}}, "without digests"), (None, "of format 3, this version of lrdint_tune reads 2")],
    ids=["older", "newer"],
)
def test_other_formats_are_refused_and_left_alone(tmp_path: Path, content: dict[str, Any] | None, what: str) -> None:
    run_ranks(_save_steps, 1, tmp_path, 3)
    state = tmp_path / "step-3" / STATE_FILE
    if content is None:
        content = json.loads(state.read_text()) | {"format": 3}
        del content["digest"]
        content["digest"] = manifest_module._digest_of_content(content)
    state.write_text(json.dumps(content))
    ((name, message),) = run_ranks(_find, 1, tmp_path, "auto")
    assert name is None and message is not None and what in message
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["step-3"]


def _save_late(folder: Path) -> str:
    """Rank 1's disk takes long."""
    model, optimizer = _sharded()
    original = CheckpointWriter.write_data

    def late(self: CheckpointWriter, plan: Any, planner: Any) -> Any:
        if dist.get_rank() == 1:
            time.sleep(4)
        return original(self, plan, planner)

    CheckpointWriter.write_data = late  # type: ignore[method-assign]
    with manager(folder, timeout=1) as checkpoints:
        with pytest.raises(UnreachableError) as error:
            checkpoints.save(1, model, optimizer, {}, wait=True)
    return str(error.value)


def test_who_does_not_write_in_time_is_named(tmp_path: Path) -> None:
    for message in run_ranks(_save_late, 2, tmp_path):
        assert re.match(r"checkpoint step-1: rank 1 on \S+ did not come to an end in save_timeout_seconds=1; ", message)


class Malicious:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_nothing_is_unpickled_but_an_index_of_tensors(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Malicious(tmp_path / "touched")))
    with pytest.raises(pickle.UnpicklingError, match="does not belong in a checkpoint"):
        CheckpointReader(tmp_path).read_metadata()
    assert not (tmp_path / "touched").exists()


def _save_on_a_full_disk(folder: Path, rank: int) -> list[str]:
    """Step 3 is saved, step 6 finds no room on ``rank``, step 9 does again; a last one does not."""
    model, optimizer = _sharded()
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    original = CheckpointWriter.write_data

    def full(self: CheckpointWriter, plan: Any, planner: Any) -> Any:
        if dist.get_rank() == rank and Path(self.path).name in ("step-6.partial", "step-12.partial"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, plan, planner)

    CheckpointWriter.write_data = full  # type: ignore[method-assign]
    said = []
    with manager(folder, keep=9) as checkpoints:
        for step in (3, 6, 9, 12):
            try:
                checkpoints.save(step, model, optimizer, {"step": step}, wait=step == 12)
            except NotSavedError as error:
                said.append(str(error))
    return said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_keeps_the_earlier_checkpoints(tmp_path: Path, rank: int) -> None:
    outcome = start_ranks(_save_on_a_full_disk, 2, tmp_path, rank)
    assert outcome.codes == [0, 0], outcome.outputs
    for said in outcome.results:
        assert len(said) == 1 and "step-12 was not written" in said[0]
        assert f"rank {rank}: [Errno 28] No space left on device" in said[0] and "step-9 stands" in said[0]
    assert "error: checkpoint step-6 was not written" in outcome.outputs[0]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["step-3", "step-9"]


def _save_beyond_a_limit(folder: Path) -> str:
    """The operating system refuses to write more than 4 KiB to a file."""
    model, optimizer = _sharded()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with manager(folder) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        with pytest.raises(NotSavedError) as error:
            checkpoints.save(1, model, optimizer, {}, wait=True)
    return str(error.value)


def test_the_reason_is_the_operating_systems(tmp_path: Path) -> None:
    """Not that of the zip writer in between."""
    (message,) = run_ranks(_save_beyond_a_limit, 1, tmp_path)
    assert "rank 0: [Errno 27] File too large" in message


def _values_while_writing(folder: Path) -> None:
    """Training changes every tensor while the save is held up."""
    model, optimizer = _sharded()
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    expected = {name: tensor.clone() for name, tensor in run_tensors(model, optimizer).items()}
    go_on = threading.Event()
    original = CheckpointWriter.write_data

    def held_up(self: CheckpointWriter, plan: Any, planner: Any) -> Any:
        assert go_on.wait(20)
        return original(self, plan, planner)

    CheckpointWriter.write_data = held_up  # type: ignore[method-assign]
    with manager(folder) as checkpoints:
        checkpoints.save(1, model, optimizer, {}, wait=False)
        for tensor in run_tensors(model, optimizer).values():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        assert checkpoints.folder.steps() == []
        go_on.set()
    load(folder, model, optimizer)
    for name, tensor in run_tensors(model, optimizer).items():
        found, wanted = (t.full_tensor() if isinstance(t, DTensor) else t for t in (tensor, expected[name]))
        assert torch.equal(found, wanted), name


def test_a_save_holds_what_was_there_when_it_began(tmp_path: Path) -> None:
    run_ranks(_values_while_writing, 2, tmp_path)
