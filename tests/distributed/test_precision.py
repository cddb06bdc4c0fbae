"""fp8 and NF4 through the trainer, with sharded weights and with adapters: steps, checkpoints, results."""

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torchao.float8.float8_training_tensor import Float8TrainingTensor

from benchmarks import fp8_loss
from lrdint_tune.export import load_adapter
from lrdint_tune.models import llama3_2
from lrdint_tune.models.decoder import is_new_tensor
from lrdint_tune.models.hf import iter_hf_folder
from lrdint_tune.training import trainer as trainer_module
from lrdint_tune.training.weights import full_tensor
from tests.common.tiny_run import SIZES, write_model, write_run
from tests.distributed.harness import run_ranks
from tests.distributed.steps import assert_same_step, start_trainer, trainer_step

WIDE = {"embed_dim": 64, "intermediate_dim": 128}
ADAPTERS = [{"type": "lora", "target_modules": ["q_proj", "o_proj", "down_proj"], "rank": 3}]
BF16 = {"model.lam_init": 0.3, "dtype": "bf16"}
FP8 = {**BF16, "fp8": "tensorwise"}
NF4 = {**BF16, "quantize_base": "nf4", "trainable": ["adapter"]}


@pytest.fixture(scope="session")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that fp8 and NF4 take; LoRA away from its start."""
    folder = tmp_path_factory.mktemp("adapted")
    write_model(folder / "model", adapters=ADAPTERS, **WIDE)
    sizes = {f"model__{key}": value for key, value in WIDE.items()}
    return write_run(
        folder, lr_scheduler=None, clip_grad_norm=None, dataset_val=None, model__adapters=ADAPTERS, **sizes
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(FP8, id="tensorwise"),
        pytest.param({**FP8, "dtype": "fp32"}, id="tensorwise, fp32"),
        pytest.param({**FP8, "fp8": "rowwise"}, id="rowwise"),
        pytest.param({**FP8, "fp8": "rowwise_with_gw_hp"}, id="rowwise_with_gw_hp"),
        pytest.param(NF4, id="nf4"),
        pytest.param({**NF4, "dtype": "fp32"}, id="nf4, fp32"),
        pytest.param(
            {**NF4, "data_parallel_replicate_dim": 2, "data_parallel_shard_dim": 1}, id="nf4, replicas of one shard"
        ),
    ],
)
def test_two_ranks(adapted: Path, changes: dict[str, Any]) -> None:
    """The step of one, whose passes hold one sequence too: what is rounded together is the same."""
    alone = {key: value for key, value in changes.items() if not key.startswith("data_parallel")}
    expected = run_ranks(trainer_step, 1, adapted, alone)[0]
    for step in run_ranks(trainer_step, 2, adapted, changes):
        assert_same_step(step, expected, loss=1e-6, gradients=1e-5)


@pytest.mark.slow
def test_nf4_on_two_replicas_of_two_shards(adapted: Path) -> None:
    expected = run_ranks(trainer_step, 1, adapted, NF4)[0]
    for step in run_ranks(trainer_step, 4, adapted, {**NF4, "data_parallel_replicate_dim": 2}):
        assert_same_step(step, expected, loss=1e-6, gradients=1e-5)


@pytest.mark.parametrize("changes", [FP8, NF4], ids=["fp8", "nf4"])
def test_near_bf16(adapted: Path, changes: dict[str, Any]) -> None:
    """Another loss, and near; a gradient of that direction, another in every tensor. (Loosely: the random model's maps
    are so sharp that bf16 itself turns the gradient by 0.12.)"""
    plain = {**changes, "fp8": "none", "quantize_base": "none"}
    expected, step = (run_ranks(trainer_step, 1, adapted, given)[0] for given in (plain, changes))
    assert 1e-5 < abs(step.loss - expected.loss) < 0.05 * expected.loss
    assert step.names == expected.names
    assert [name for name, gradient in expected.gradients.items() if torch.equal(gradient, step.gradients[name])] == []
    one, other = (torch.cat([g.flatten() for g in found.gradients.values()]) for found in (expected, step))
    assert torch.cosine_similarity(one, other, dim=0) > 0.5


@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        pytest.param(FP8, "full", id="fp8, full", marks=pytest.mark.slow),
        pytest.param(FP8, "selective", id="fp8, selective"),
        pytest.param(NF4, "full", id="nf4, full"),
        pytest.param(NF4, "selective", id="nf4, selective", marks=pytest.mark.slow),
    ],
)
def test_activation_checkpointing(adapted: Path, changes: dict[str, Any], mode: str) -> None:
    """The same bits as without."""
    expected = run_ranks(trainer_step, 2, adapted, changes)[0]
    for step in run_ranks(
        trainer_step, 2, adapted, {**changes, "enable_activation_checkpointing": True, "ac_mode": mode}
    ):
        assert_same_step(step, expected, loss=0, gradients=0)


def _interrupted(file: Path, changes: dict[str, Any]) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses of steps 3 and 4 without and with a stop after step 2, then the results; the last state."""
    first = start_trainer(file, changes)
    losses = []
    for step in range(4):
        if step == 2:
            first.save()
        losses.append(first._train_step(False)[0]["loss_metrics/global_avg_loss"])
    second = start_trainer(file, changes)
    again = [second._train_step(False)[0]["loss_metrics/global_avg_loss"] for _ in range(2)]
    second.export()
    return losses[2:], again, {name: full_tensor(t) for name, t in second.model.state_dict().items()}


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        pytest.param(FP8, 1, id="fp8"),
        pytest.param(FP8, 2, id="fp8, two ranks", marks=pytest.mark.slow),
        pytest.param(NF4, 1, id="nf4", marks=pytest.mark.slow),
        pytest.param(NF4, 2, id="nf4, two ranks"),
    ],
)
def test_checkpoints_and_results(adapted: Path, tmp_path: Path, changes: dict[str, Any], size: int) -> None:
    """A resumed run has the same losses; what it exports are ordinary weights, and an adapter folder."""
    straight, resumed, state = run_ranks(_interrupted, size, adapted, {**changes, "output_dir": str(tmp_path)})[0]
    assert resumed == straight

    model = llama3_2(**{**SIZES, **WIDE, "method": "dint", "rank": 3, "lam_init": 0.3, "adapters": ADAPTERS})
    exported = dict(iter_hf_folder(tmp_path / "hf", model.spec))
    model.load_state_dict(exported)
    pretrained = dict(iter_hf_folder(adapted.parent / "model", model.spec))
    new = load_adapter(tmp_path / "adapter", model.spec)
    quantised = changes.get("quantize_base") == "nf4"
    for name, tensor in exported.items():
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name
        if is_new_tensor(name):
            assert torch.equal(new[name], state[name]), name
        elif quantised and (".mlp." in name or ".attn." in name):
            error = (tensor - pretrained[name]).norm() / pretrained[name].norm()
            assert 0.02 < error < 0.15, name
        elif quantised or ".attn." not in name:
            assert torch.equal(tensor, pretrained[name].to(tensor.dtype)), name


def _gathered_in_fp8(file: Path, changes: dict[str, Any]) -> tuple[list[float], set[type]]:
    """Losses, and what FSDP2 makes of the weights of the linear layers."""
    trainer_module.check_precision_device = lambda *_: None  # type: ignore[assignment]  # what happens on CUDA
    trainer = start_trainer(file, changes)
    losses = [trainer._train_step(False)[0]["loss_metrics/global_avg_loss"] for _ in range(3)]
    layer: Any = trainer.model.layers[0]
    layer.unshard()
    types = {type(layer.attn.q_proj.weight.data), type(layer.mlp.w1.weight.data)}
    trainer.save()
    trainer.export()
    return losses, types


@pytest.mark.slow
def test_weights_gathered_in_fp8(adapted: Path, tmp_path: Path) -> None:
    """Frozen weights and trained ones: their scale is that of the whole weight, as it is on one rank."""
    changes = {**FP8, "fp8_all_gather": True, "output_dir": str(tmp_path)}
    (alone, types), *_ = run_ranks(_gathered_in_fp8, 1, adapted, {**changes, "resume": "never"})
    assert types == {Float8TrainingTensor}
    for losses, types in run_ranks(_gathered_in_fp8, 2, adapted, {**changes, "output_dir": str(tmp_path / "two")}):
        assert types == {Float8TrainingTensor}
        assert losses == pytest.approx(alone, rel=1e-5)


def _compared(file: Path, steps: int) -> dict[str, list[float]]:
    config = {**yaml.safe_load(file.read_text()), "dtype": "bf16", "global_batch_size": 1}
    return fp8_loss.compare(config, ["tensorwise"], steps)


def test_training_in_fp8_follows_bf16(adapted: Path) -> None:
    """What benchmarks/fp8_loss.py measures on a pretrained model, here on the random one."""
    found = run_ranks(_compared, 1, adapted, 10)[0]
    assert found["none"][-1] < found["none"][0]
    (difference,) = fp8_loss.differences(found).values()
    assert len(difference) == 10
    assert 1e-5 < statistics.mean(difference) < 0.05
