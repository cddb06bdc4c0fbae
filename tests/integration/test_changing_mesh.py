"""A run leaves the same behind under tensor and context parallelism, and its checkpoints go on under any mesh."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.common.tiny_run import read_losses, write_run
from tests.integration.runs import checkpoints, finished_run, killed, values

TENSOR = ("data_parallel_shard_dim=1", "tensor_parallel_dim=2")
CONTEXT = ("data_parallel_shard_dim=1", "context_parallel_dim=2")
TAGS = ("grad_norm", "adapter_grad_norm/layers.1", "lambda_min/layers.0", "lambda_max/layers.1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(
        tmp_path_factory.mktemp("changing"), model__lam_init=0.3, trainable=["all"], epochs=1, dataset_val__num_rows=4
    )


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five steps on one process."""
    out = tmp_path_factory.mktemp("whole")
    finished_run(run, f"output_dir={out}")
    return out


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [TENSOR, CONTEXT], ids=["tensor", "context"])
def test_what_is_left_behind(run: Path, whole: Path, tmp_path: Path, mesh: tuple[str, ...]) -> None:
    """Curves, held-out losses and weights are those of one process."""
    finished_run(run, f"output_dir={tmp_path}", *mesh, size=2)
    assert read_losses(tmp_path) == pytest.approx(read_losses(whole), abs=1e-5)
    for tag in (*TAGS, "validation_metrics/loss"):
        assert values(tmp_path, tag) == pytest.approx(values(whole, tag), rel=1e-3), tag
    for file in ("hf/model.safetensors", "adapter/adapter_model.safetensors", "adapter/modules_to_save.safetensors"):
        expected, found = load_file(whole / file), load_file(tmp_path / file)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-3, msg=f"{file}: {name}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "size"),
    [(TENSOR, 2), (CONTEXT, 2), (("tensor_parallel_dim=2",), 4)],
    ids=["tensor", "context", "shard x tensor"],
)
def test_a_run_changes_its_mesh(run: Path, whole: Path, tmp_path: Path, mesh: tuple[str, ...], size: int) -> None:
    """There and back: begun under the mesh and continued on one process, and the other way round."""
    for first, second in ((mesh, ()), ((), mesh)):
        out = tmp_path / f"from-{len(first)}"
        killed(run, f"output_dir={out}", *first, step=4, size=size if first else 1)
        assert checkpoints(out) == ["step-3"]
        finished_run(run, f"output_dir={out}", *second, size=size if second else 1)
        assert read_losses(out) == pytest.approx(read_losses(whole), abs=1e-5)
