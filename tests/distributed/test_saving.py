"""Reading and writing sharded weights: every rank gets its part, and saving changes nothing in the live run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lrdint_tune.models.hf import iter_hf_folder
from lrdint_tune.training.components import build_model
from lrdint_tune.training.weights import full_tensor
from tests.common.tiny_run import write_model, write_run
from tests.distributed.harness import run_ranks
from tests.distributed.steps import read_config, start_trainer

SIZES = {"num_heads": 3, "num_kv_heads": 1, "embed_dim": 24}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 heads, so that shards are uneven; annealed λ, so that there is a buffer to save."""
    folder = tmp_path_factory.mktemp("saving")
    write_model(folder / "model", **SIZES)
    sizes = {f"model__{key}": value for key, value in SIZES.items()}
    return write_run(folder, model__lam="annealed", **sizes)


def _bits(tensor: Tensor) -> Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().clone()


def _snapshot(trainer: Any) -> dict[str, Any]:
    optimizer = trainer.optimizer.state_dict()
    return {
        "model": {name: _bits(t) for name, t in trainer.model.state_dict(keep_vars=True).items()},
        "identity": {name: id(p) for name, p in trainer.model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in trainer.model.named_parameters()},
        "training": trainer.model.training,
        "optimizer": {
            f"{i}.{key}": _bits(value) for i, entry in optimizer["state"].items() for key, value in entry.items()
        },
        "param_groups": repr(optimizer["param_groups"]),
        "scheduler": repr(trainer.scheduler.state_dict()),
        "loader": trainer.loader.state_dict(),
        "rng": torch.get_rng_state(),
    }


def _different(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what is not bitwise equal."""
    found = []
    for part, old in before.items():
        new = after[part]
        if isinstance(old, dict) and any(isinstance(value, Tensor) for value in old.values()):
            assert old.keys() == new.keys()
            found += [f"{part}.{name}" for name in old if not torch.equal(old[name], new[name])]
        elif isinstance(old, Tensor):
            found += [] if torch.equal(old, new) else [part]
        elif old != new:
            found.append(part)
    return found


def _save_and_export(config: Path, output_dir: str, save: bool) -> tuple[list[str], list[float]]:
    trainer = start_trainer(config, {"output_dir": output_dir})
    losses = [trainer._train_step(False)[0]["loss_metrics/global_avg_loss"] for _ in range(2)]
    before = _snapshot(trainer)
    assert before["optimizer"], "the optimizer has no state yet, nothing would be compared"
    if save:
        for action in (trainer.validate, trainer.save, trainer.export):
            action()
    after = _snapshot(trainer)
    losses += [trainer._train_step(False)[0]["loss_metrics/global_avg_loss"] for _ in range(2)]
    return _different(before, after), losses


@pytest.mark.parametrize("size", [1, 2])
def test_saving_exporting_and_validating_change_nothing(config: Path, tmp_path: Path, size: int) -> None:
    with_save = run_ranks(_save_and_export, size, config, str(tmp_path / "saved"), True)
    without = run_ranks(_save_and_export, size, config, str(tmp_path / "unsaved"), False)
    assert [different for different, _ in with_save] == [[]] * size
    assert [losses for _, losses in with_save] == [losses for _, losses in without]


def _validate_twice(config: Path, output_dir: str) -> tuple[float, float]:
    adapters = [{"type": "lora", "target_modules": ["q_proj", "up_proj"], "lora_alpha": 100, "lora_dropout": 0.5}]
    trainer = start_trainer(config, {"output_dir": output_dir, "model.adapters": adapters})
    for _ in range(3):
        trainer._train_step(False)
    return trainer.validate(), trainer.validate()


def test_validation_has_no_dropout(config: Path, tmp_path: Path) -> None:
    (first, second), *_ = run_ranks(_validate_twice, 1, config, str(tmp_path))
    assert first == second


def _loaded(config: Path, output_dir: str) -> tuple[dict[str, Tensor], bool]:
    trainer = start_trainer(config, {"output_dir": output_dir})
    state = trainer.model.state_dict()
    sharded = all(isinstance(t, DTensor) for name, t in state.items() if not name.endswith(".step"))
    return {name: full_tensor(t) for name, t in state.items()}, sharded


def test_every_rank_loads_its_shard(config: Path, tmp_path: Path) -> None:
    """The pretrained tensors as they are in the file, and the same new tensors for every number of ranks."""
    (one, _), *_ = run_ranks(_loaded, 1, config, str(tmp_path))
    for two, sharded in run_ranks(_loaded, 2, config, str(tmp_path)):
        assert sharded
        assert two.keys() == one.keys()
        assert [name for name in one if not torch.equal(one[name], two[name])] == []
    spec = build_model(read_config(config, {})).spec
    for name, tensor in iter_hf_folder(config.parent / "model", spec):
        assert torch.equal(one[name], tensor), name
