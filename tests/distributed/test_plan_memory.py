"""What the planner says of a run, beside the same run: every allocation of a real step, every collective of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.plan_memory import Measured, measure
from lrdint_tune.planning import Plan, plan
from lrdint_tune.planning.memory import OPTIMIZER, PARAMETERS
from lrdint_tune.planning.options import PlanOptions
from tests.common.plans import SMALL
from tests.common.tiny_run import write_model, write_run
from tests.distributed.harness import run_ranks
from tests.distributed.steps import read_config, start_trainer

TOLERANCE = 0.15  # gloo gives back some of its copies late, by how much depends on the moment
ADAPTERS = [{"type": "lora", "target_modules": ["q_proj", "down_proj"], "rank": 4}]
METHODS: dict[str, dict[str, Any]] = {
    "none": {"method": "none", "adapters": ADAPTERS},
    "dint": {"method": "dint", "rank": 3},
    "lmam": {"method": "lmam"},
}
TRAINABLE = (["adapter"], ["adapter", "attention"], ["all"])
CHECKPOINTING: dict[str, dict[str, Any]] = {
    "none": {"enable_activation_checkpointing": False},
    "full": {"enable_activation_checkpointing": True, "ac_mode": "full"},
    "selective": {"enable_activation_checkpointing": True, "ac_mode": "selective"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose activations, parameters and logits dwarf a kernel's scratch memory; two models to choose from."""
    folder = tmp_path_factory.mktemp("planned")
    write_model(folder / "model", **SMALL)
    write_model(folder / "narrow", **{**SMALL, "vocab_size": 300})
    return write_run(folder, dataset_val=None)


def changes(run: Path, method: str, *, vocab_size: int = 2048, **more: Any) -> dict[str, Any]:
    """Config keys of one measured run."""
    model = {"_component_": "lrdint_tune.models.llama3_2", **SMALL, **METHODS[method], "vocab_size": vocab_size}
    folder = run.parent / ("model" if vocab_size == 2048 else "narrow")
    lam_lr = 1e-2 if method == "dint" else None
    return {"model": model, "checkpointer.checkpoint_dir": str(folder), "lam_lr": lam_lr, **more}


def measured(run: Path, all_changes: list[dict[str, Any]]) -> list[Measured]:
    return [measure(read_config(run, one)) for one in all_changes]


def predicted(run: Path, one: dict[str, Any], size: int = 2) -> Plan:
    return plan(read_config(run, one), PlanOptions(world_size=size, gpu="cpu").target)


def compare(run: Path, all_changes: list[dict[str, Any]], size: int = 2) -> None:
    wrong = []
    for one, found in zip(all_changes, run_ranks(measured, size, run, all_changes, timeout=280)[0], strict=True):
        memory = predicted(run, one, size).memory
        assert memory.peak[PARAMETERS] == found.parameters, one
        assert memory.peak[OPTIMIZER] == found.optimizer_state, one
        if abs(memory.total / found.peak - 1) > TOLERANCE:
            wrong.append(f"{memory.total / found.peak:.3f} at the {memory.moment}: {one}")
    assert not wrong, "\n".join(wrong)


def test_peak(run: Path) -> None:
    compare(run, [changes(run, "dint", vocab_size=300, dtype="bf16", **CHECKPOINTING["full"])])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_peak_of_every_combination(run: Path, method: str) -> None:
    dtypes = ("fp32", "bf16") if method == "dint" else ("bf16",)
    grid = itertools.product(TRAINABLE, CHECKPOINTING.values(), dtypes)
    compare(run, [changes(run, method, trainable=groups, dtype=dtype, **mode) for groups, mode, dtype in grid])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_peak_elsewhere(run: Path, size: int) -> None:
    """Several passes and one, rows without packing, a small vocabulary, another optimizer, one rank and two."""
    unpacked = {"dataset.packed": False, "dataset.long_rows": "truncate", "max_seq_len": 128, "batch_size": 2}
    sgd = {"_component_": "torch.optim.SGD", "lr": 1e-3}
    compare(
        run,
        [
            changes(run, "none", vocab_size=300, trainable=["attention"], optimizer=sgd),
            changes(run, "none", vocab_size=300, trainable=["all"], global_batch_size=2, **CHECKPOINTING["full"]),
            changes(run, "dint", vocab_size=300, trainable=["all"], dtype="bf16", **CHECKPOINTING["full"]),
            changes(run, "dint", vocab_size=300, trainable=["all"], **unpacked),
            changes(run, "lmam", vocab_size=300, dtype="bf16", **CHECKPOINTING["selective"]),
        ],
        size,
    )


@dataclass(frozen=True)
class Sent:
    """Collectives of one kind in a step: how many, and bytes of their whole buffers."""

    count: int
    bytes: int


def collectives(run: Path, one: dict[str, Any]) -> dict[str, Sent]:
    """What FSDP sends in one step of the trainer."""
    trainer = start_trainer(run, one)
    sizes: dict[str, list[int]] = {"all-gather": [], "reduce-scatter": []}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.__name__
            kind = "all-gather" if "allgather" in name else "reduce-scatter" if "reduce_scatter" in name else None
            if kind:
                sizes[kind].append(max(t.nbytes for t in tree_leaves(args) if isinstance(t, Tensor)))
            return func(*args, **(kwargs or {}))

    with Watch():
        trainer._train_step(logging_step=False)
    return {kind: Sent(len(found), sum(found)) for kind, found in sizes.items()}


@pytest.mark.parametrize("trainable", TRAINABLE, ids=str)
def test_collectives(run: Path, trainable: list[str]) -> None:
    one = changes(run, "dint", trainable=trainable, dtype="bf16")
    found = run_ranks(collectives, 2, run, one)[0]
    expected: dict[str, Sent] = {}
    for part in predicted(run, one).traffic:
        before = expected.get(part.kind, Sent(0, 0))
        expected[part.kind] = Sent(before.count + part.count, before.bytes + part.bytes)
    assert found == expected
