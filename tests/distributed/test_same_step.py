"""However a global batch is spread over ranks and passes, its loss and the gradient of every trained tensor are those
of one plain model on the whole batch."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.common.tiny_run import SIZES, write_model, write_run
from tests.distributed.harness import run_ranks
from tests.distributed.steps import (
    Step,
    assert_same_step,
    continued_heads,
    plain_step,
    selected_heads,
    trainer_step,
)

# λ away from 0, so that every new tensor has a gradient.
DINT = {"model.lam_init": 0.3}
NONE = {"_component_": "lrdint_tune.models.llama3_2", **SIZES, "method": "none"}
ADAPTERS = [
    {"type": "lora", "target_modules": ["q_proj", "k_proj", "up_proj"], "rank": 3},
    {"type": "quanta", "target_modules": ["o_proj", "down_proj"], "dims": [5, 4, 4]},
    {"type": "bottleneck", "rank": 5},
]
THREE_HEADS = {"num_heads": 3, "num_kv_heads": 1, "embed_dim": 24}


@pytest.fixture(scope="session")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 heads; 2 layers."""
    return write_run(tmp_path_factory.mktemp("even"), lr_scheduler=None, clip_grad_norm=None, dataset_val=None)


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 query heads and 1 key head: over two ranks λ [3] is split 2 + 1, and k2.up [1, r, hd] leaves one rank empty."""
    folder = tmp_path_factory.mktemp("uneven")
    write_model(folder / "model", **THREE_HEADS)
    sizes = {f"model__{key}": value for key, value in THREE_HEADS.items()}
    return write_run(folder, lr_scheduler=None, clip_grad_norm=None, dataset_val=None, **sizes)


@pytest.fixture(scope="session")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of every type in the folder, away from their start; ranks and axes that two ranks share unevenly."""
    folder = tmp_path_factory.mktemp("adapted")
    write_model(folder / "model", adapters=ADAPTERS)
    return write_run(folder, lr_scheduler=None, clip_grad_norm=None, dataset_val=None, model__adapters=ADAPTERS)


@cache
def _expected(function: Any, file: Path, changes: str, at: int) -> Step:
    return run_ranks(function, 1, file, json.loads(changes), at)[0]


def one_process(function: Any, file: Path, changes: dict[str, Any], at: int = 0) -> Step:
    """On one process; the same question is answered once."""
    return _expected(function, file, json.dumps(changes, sort_keys=True), at)


def check(file: Path, changes: dict[str, Any], at: int = 0, sizes: tuple[int, ...] = (1, 2), **tolerances: Any) -> None:
    """The trainer on each number of ranks against one plain model."""
    expected = one_process(plain_step, file, changes, at)
    for size in sizes:
        for step in run_ranks(trainer_step, size, file, changes, at):
            assert_same_step(step, expected, **tolerances)


@pytest.mark.parametrize(
    ("changes", "at"),
    [
        pytest.param(DINT, 0, id="learned"),
        pytest.param({"model.lam": "annealed", "model.anneal_steps": 4}, 2, id="annealed, half-way"),
        pytest.param({"model": NONE, "trainable": ["attention"]}, 0, id="none"),
        pytest.param({"model.method": "diff", "model.rank": None, **DINT}, 0, id="diff, full rank"),
        pytest.param({"trainable": ["all"], **DINT}, 0, id="tied embeddings and everything else"),
    ],
)
def test_ranks(even: Path, changes: dict[str, Any], at: int) -> None:
    check(even, changes, at)


def test_ranks_adapters(adapted: Path) -> None:
    check(adapted, {"trainable": ["adapter"], **DINT})


def other(method: str, **options: Any) -> dict[str, Any]:
    return {"model": {"_component_": "lrdint_tune.models.llama3_2", **SIZES, "method": method, **options}}


HALF_WAY = {"lam": "annealed", "anneal_steps": 4}  # with two steps done: λ = 0.2


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(other("diff", rank=3, lam="exponential", noise_heads="kv"), id="exponential, noise_heads"),
        pytest.param(other("dint", rank=3, lam="sigmoid", secondary_keys="shared"), id="sigmoid, secondary_keys"),
        pytest.param(other("daa", **HALF_WAY), id="daa"),
        pytest.param(other("dex", **HALF_WAY), id="dex"),
        pytest.param(other("diffq", **HALF_WAY), id="diffq"),
        pytest.param(other("diffk", **HALF_WAY), id="diffk"),
        pytest.param(other("diffv", **HALF_WAY), id="diffv"),
        pytest.param(other("difflora", rank=3), id="difflora"),
        pytest.param(other("lmam", n=256, scale=1.0, softmax_map=True), id="lmam"),
    ],
)
def test_ranks_of_every_method(even: Path, model: dict[str, Any]) -> None:
    # LoRA's down factor and LMAM's first factor meet a zero at the start.
    check(even, {"lam_lr": None, **model}, 2, sizes=(2,), asleep=("1.down.weight", "method.a"))


def test_calibration_does_not_count_padding(even: Path) -> None:
    """Unpacked rows of unequal length: the heads are those of the rows one by one, which have hardly any padding."""
    changes = {"lam_lr": None, "calibration_batches": 2, **other("dex", heads="top_entropy", top_k=1, **HALF_WAY)}
    together, apart = (
        run_ranks(selected_heads, 1, even, {**changes, "dataset.packed": False, "batch_size": size})[0]
        for size in (4, 1)
    )
    assert together == apart


def test_calibration_keeps_the_heads_of_a_trained_method(even: Path, tmp_path: Path) -> None:
    changes = {"lam_lr": None, "calibration_batches": 2, **other("dex", heads="top_entropy", top_k=1, **HALF_WAY)}
    kept = run_ranks(continued_heads, 1, even, changes, str(tmp_path / "hf"))[0]
    assert kept == [[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]]


def test_calibration_chooses_the_same_heads_on_any_number_of_ranks(even: Path) -> None:
    changes = {"lam_lr": None, "calibration_batches": 2, **other("dex", heads="top_entropy", top_k=1, **HALF_WAY)}
    chosen = [run_ranks(selected_heads, size, even, changes) for size in (1, 2)]
    assert chosen[0][0] == chosen[1][0] == chosen[1][1]
    assert [sum(layer) for layer in chosen[0][0]] == [1, 1]
    # Not what would come without looking: the layers differ, or a head other than the first is taken.
    assert len(set(map(tuple, chosen[0][0]))) > 1 or chosen[0][0][0][0] == 0


@pytest.mark.parametrize("sharing", ["head", "layer"])
def test_ranks_uneven_shards(uneven: Path, sharing: str) -> None:
    """λ of [3] over two ranks, and of [1], which leaves one rank without any."""
    check(uneven, {**DINT, "model.lam_sharing": sharing}, sizes=(2,))


@pytest.mark.parametrize(("size", "batch_size"), [(1, 4), (1, 2), (1, 1), (2, 2), (2, 1)])
def test_ranks_and_passes_with_unequal_token_counts(even: Path, size: int, batch_size: int) -> None:
    """Unpacked rows have unequal numbers of trained tokens: a mean of means would be another number."""
    changes = {**DINT, "dataset.packed": False}
    expected = one_process(plain_step, even, changes)
    for step in run_ranks(trainer_step, size, even, {**changes, "batch_size": batch_size}):
        assert_same_step(step, expected)


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize(("size", "dtype"), [(1, "fp32"), (2, "fp32"), (2, "bf16")])
def test_activation_checkpointing(even: Path, mode: str, size: int, dtype: str) -> None:
    """The same bits as without, on as many ranks."""
    changes = {**DINT, "dtype": dtype}
    expected = run_ranks(trainer_step, size, even, changes)[0]
    for step in run_ranks(
        trainer_step, size, even, {**changes, "enable_activation_checkpointing": True, "ac_mode": mode}
    ):
        assert_same_step(step, expected, loss=0, gradients=0)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(other("dex", lam="exponential"), id="dex"),
        pytest.param(other("diffv", lam="sigmoid"), id="diffv"),
        pytest.param(other("lmam", n=256, scale=1.0, softmax_map=True), id="lmam"),
    ],
)
def test_activation_checkpointing_of_other_methods(even: Path, model: dict[str, Any]) -> None:
    """What a method computes beside the pretrained attention comes again with the same bits."""
    changes = {"lam_lr": None, "dtype": "bf16", **model}
    expected = run_ranks(trainer_step, 2, even, changes)[0]
    for step in run_ranks(
        trainer_step, 2, even, {**changes, "enable_activation_checkpointing": True, "ac_mode": "selective"}
    ):
        assert_same_step(step, expected, loss=0, gradients=0, asleep=("method.a",))


def test_replicas_of_one_shard_each(even: Path) -> None:
    """A 2 x 1 mesh: gradients are averaged over the replicas."""
    changes = {**DINT, "data_parallel_replicate_dim": 2, "data_parallel_shard_dim": 1}
    expected = one_process(plain_step, even, DINT)
    for step in run_ranks(trainer_step, 2, even, changes):
        assert_same_step(step, expected)


@pytest.mark.parametrize("lam", ["learned", "annealed"])
def test_bf16_compute(even: Path, lam: str) -> None:
    """Loosely: bf16 has 8 bits. Norms and MLP are frozen, so in bf16; the trained tensors stay float32."""
    changes = {"model.lam": lam, "model.lam_init": 0.3, **({"model.anneal_steps": 4} if lam == "annealed" else {})}
    expected = one_process(plain_step, even, {**changes, "dtype": "fp32"}, 2)
    for size in (1, 2):
        for step in run_ranks(trainer_step, size, even, {**changes, "dtype": "bf16"}, 2):
            assert all(gradient.dtype == torch.float32 for gradient in step.gradients.values())
            assert_same_step(step, expected, loss=1e-2, gradients=0.2)
