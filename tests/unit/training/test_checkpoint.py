"""The checkpoint folder's bookkeeping, and one round trip; resuming whole runs is tested in tests/integration."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchao.optim import AdamW8bit

from lrdint_tune.errors import ConfigError
from lrdint_tune.training.checkpoint import CheckpointManager, check_same_run
from tests.distributed.harness import run_ranks


def manager(folder: Path, keep: int = 2) -> CheckpointManager:
    return CheckpointManager(folder, keep_last_n=keep, is_main=True)


def pretend(folder: Path, name: str, *files: str) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    for file in files:
        (path / file).write_text("{}")
    return path


WHOLE = ("train_state.json", ".metadata")


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    assert manager(tmp_path / "absent").steps() == []
    for step in (10, 9, 100):
        pretend(tmp_path, f"step-{step}", *WHOLE)
    pretend(tmp_path, "step-200", "train_state.json")
    pretend(tmp_path, "step-201", ".metadata")
    pretend(tmp_path, "step-202.partial", *WHOLE)
    pretend(tmp_path, "mystep-203", *WHOLE)
    assert manager(tmp_path).steps() == [9, 10, 100]
    assert manager(tmp_path).find("auto") == tmp_path / "step-100"


def test_find(tmp_path: Path) -> None:
    path = pretend(tmp_path, "step-3", *WHOLE)
    assert manager(tmp_path).find("never") is None
    assert manager(tmp_path / "other").find("auto") is None
    assert manager(tmp_path / "other").find(str(path)) == path
    with pytest.raises(ConfigError, match="resume='.*step-4': not a complete checkpoint.*auto or never"):
        manager(tmp_path).find(str(tmp_path / "step-4"))


def test_recover_removes_what_never_became_complete(tmp_path: Path) -> None:
    pretend(tmp_path, "step-3", *WHOLE)
    pretend(tmp_path, "step-6.partial", ".metadata")
    manager(tmp_path).recover()
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_later_checkpoints_are_set_aside(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        pretend(tmp_path, f"step-{step}", *WHOLE)
    pretend(tmp_path, "step-12", ".metadata")  # not whole, but in the way
    manager(tmp_path).set_aside_after(3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set-aside-1", "step-3"]
    assert sorted(p.name for p in (tmp_path / "set-aside-1").iterdir()) == ["step-12", "step-6", "step-9"]
    manager(tmp_path).set_aside_after(3)
    manager(tmp_path).set_aside_after(0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set-aside-1", "set-aside-2"]
    assert manager(tmp_path).find("auto") is None


def test_unreadable_state(tmp_path: Path) -> None:
    path = pretend(tmp_path, "step-3", ".metadata")
    (path / "train_state.json").write_text("{")
    with pytest.raises(ConfigError, match="resume: .*train_state.json is not readable"):
        manager(tmp_path).read_state(path)


def test_another_run_is_refused() -> None:
    saved = {"method": "dint", "rank": 8, "seed": 0}
    check_same_run(saved, dict(saved), Path("x"))
    with pytest.raises(ConfigError) as error:
        check_same_run(saved, {"method": "dint", "rank": 4, "integral": "causal", "seed": 0}, Path("out/step-3"))
    message = str(error.value)
    assert "out/step-3" in message
    assert "integral is None there and 'causal' here; rank is 8 there and 4 here" in message
    assert "seed" not in message


def test_unwritable_folder_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output_dir: cannot write to .*choose a writable folder"):
        manager(tmp_path / "file" / "checkpoints").check_writable()
    manager(tmp_path / "new").check_writable()
    assert list((tmp_path / "new").iterdir()) == []


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

    checkpoints = manager(folder, keep=2)
    model, optimizer = build()
    frozen = model.get_parameter("0.bias").clone()
    for step in range(1, 4):
        _step(model, optimizer)
        checkpoints.save(step, model, optimizer, {"step": step})
    assert checkpoints.steps() == [2, 3]
    assert checkpoints.read_state(folder / "step-3") == {"step": 3}
    expected = [_step(model, optimizer) for _ in range(2)]

    other, its_optimizer = build()
    with torch.no_grad():
        other.get_parameter("0.bias").copy_(frozen)  # not in the checkpoint
    checkpoints.load(folder / "step-3", other, its_optimizer)
    checkpoints.load_rng(folder / "step-3")
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
    path = manager(folder).save(1, model, optimizer, {})
    saved = {name: p.clone() for name, p in model.named_parameters()}
    other = torch.optim.AdamW(model.parameters(), lr=0.7, weight_decay=0.5, **options)
    manager(folder).load(path, model, other)
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
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, AdamW8bit(model.parameters(), lr=0.1)


def _save_eight_bit(folder: Path, *sizes: int) -> None:
    for rows in sizes:
        model, optimizer = _sharded_eight_bit(rows)
        model(torch.randn(3, 96)).sum().backward()
        optimizer.step()
        manager(folder).save(rows, model, optimizer, {})


def _load_eight_bit(folder: Path, *sizes: int) -> list[str]:
    outcomes = []
    for rows in sizes:
        model, optimizer = _sharded_eight_bit(rows)
        try:
            manager(folder).load(folder / f"step-{rows}", model, optimizer)
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


def _rng_of_a_new_rank(folder: Path) -> str:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    path = manager(folder).save(1, model, optimizer, {})
    (path / "rng-0.pt").unlink()
    before = torch.get_rng_state()
    manager(folder).load_rng(path)
    assert torch.equal(torch.get_rng_state(), before)
    return "kept"


def test_rank_that_did_not_exist_keeps_its_random_state(tmp_path: Path) -> None:
    assert run_ranks(_rng_of_a_new_rank, 1, tmp_path) == ["kept"]
