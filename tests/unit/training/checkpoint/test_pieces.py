"""Tensors written in pieces come back whole, on any number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lrdint_tune.training.checkpoint import pieces
from lrdint_tune.training.checkpoint.storage import CheckpointReader, read_whole_tensors
from tests.distributed.harness import run_ranks
from tests.unit.training.checkpoint.test_manager import load, manager, world

SHAPES: dict[str, tuple[int, ...]] = {"wide": (3, 100), "tall": (41, 5), "vector": (70,), "one row": (1, 90)}


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterDict({name: torch.randn(shape) for name, shape in SHAPES.items()})


def _run(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Several()
    fully_shard(model, mesh=world().mesh["shard"])
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def _save(folder: Path) -> None:
    pieces.PIECE_BYTES = 200  # 50 numbers
    model, optimizer = _run(0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with manager(folder) as checkpoints:
        checkpoints.save(1, model, optimizer, {}, wait=True)
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        torch.save(dict(Several().named_parameters()), folder / "before")


def _loaded(folder: Path) -> dict[str, Any]:
    model, optimizer = _run(1)
    load(folder, model, optimizer)
    return {name: p.full_tensor() for name, p in model.named_parameters() if isinstance(p, DTensor)}


@pytest.mark.parametrize(("writers", "readers"), [(1, 1), (1, 3), (3, 1), (2, 3)])
def test_round_trip(tmp_path: Path, writers: int, readers: int) -> None:
    run_ranks(_save, writers, tmp_path)
    before = torch.load(tmp_path / "before")
    reader = CheckpointReader(tmp_path / "step-1")
    whole = dict(read_whole_tensors(reader, [f"model.{name}" for name in before]))
    for of_rank in run_ranks(_loaded, readers, tmp_path):
        for name, tensor in before.items():
            # One step of AdamW with a gradient of 1: decay by lr * 0.01, then by lr.
            expected = tensor.detach() * (1 - 0.1 * 0.01) - 0.1
            torch.testing.assert_close(of_rank[name], expected)
            assert torch.equal(whole[f"model.{name}"], of_rank[name])
    sizes = [chunk.sizes.numel() for name in before for chunk in reader.stored(f"model.{name}").chunks]
    assert max(sizes) == 100 and len(sizes) >= 3 + 5 + 2 + 1, "a row stays whole, all else is cut"
