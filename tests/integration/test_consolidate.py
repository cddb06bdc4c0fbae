"""A checkpoint alone becomes the folders that the run itself leaves behind, byte for byte."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lrdint_tune.errors import ConfigError, NotSavedError
from lrdint_tune.training.checkpoint import consolidation
from lrdint_tune.training.checkpoint.consolidation import consolidate
from tests.common.tiny_run import write_model
from tests.integration.runs import finished_run, tree
from tests.unit.training.checkpoint.test_manifest import flip


def results(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in tree(folder).items() if name.startswith(("hf/", "adapter/"))}


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        ((), 2),
        (("model.method=none", "model.rank=null", "trainable=[attention]"), 1),
        (("untie_lm_head=true", "trainable=[adapter,lm_head]", "model.lam=annealed"), 1),
        (("quantize_base=nf4", "trainable=[adapter]", "dtype=bf16", "model.embed_dim=64"), 2),
        (("model.adapters=[{type: lora, target_modules: [q_proj, down_proj], rank: 2}]",), 1),
    ],
    ids=["dint, two ranks", "none", "untied head", "nf4, bf16", "lora"],
)
def test_as_the_run_itself(config: Path, tmp_path: Path, overrides: tuple[str, ...], size: int) -> None:
    if "model.embed_dim=64" in overrides:  # NF4 takes layers with inputs of a multiple of 64
        write_model(tmp_path / "model", embed_dim=64)
        overrides = (*overrides, f"checkpointer.checkpoint_dir={tmp_path / 'model'}")
    if "model.rank=null" in overrides:
        overrides = tuple("~model.rank" if value == "model.rank=null" else value for value in overrides)
    finished_run(config, f"output_dir={tmp_path / 'run'}", "max_steps_per_epoch=2", "epochs=1", *overrides, size=size)
    consolidate(tmp_path / "run", tmp_path / "out")
    assert results(tmp_path / "out") == results(tmp_path / "run")
    assert ("adapter/adapter_config.json" in results(tmp_path / "out")) == ("model.method=none" not in overrides)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run with the checkpoints of steps 6 and 8."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_an_earlier_step(config: Path, run: Path, tmp_path: Path) -> None:
    consolidate(run / "checkpoints" / "step-6", tmp_path / "six")
    consolidate(run / "checkpoints", tmp_path / "latest")
    assert results(tmp_path / "latest") == results(run) != results(tmp_path / "six")


def test_a_damaged_checkpoint_is_left_and_the_one_before_it_taken(run: Path, tmp_path: Path) -> None:
    consolidate(run / "checkpoints" / "step-6", tmp_path / "six")
    flip(run / "checkpoints" / "step-8" / "__0_0.distcp", 1000)
    before = tree(run)
    consolidate(run, tmp_path / "out")
    assert results(tmp_path / "out") == results(tmp_path / "six")
    assert tree(run) == before, "it only reads"


def _other_weights(run: Path, folder: Path) -> tuple[Path, str | None]:
    write_model(folder / "other", num_layers=1)
    return run, str(folder / "other")


def _truncated(run: Path, folder: Path) -> tuple[Path, str | None]:
    step = run / "checkpoints" / "step-8"
    os.truncate(step / "__0_0.distcp", 99)
    return step, None


def _foreign_metadata(run: Path, folder: Path) -> tuple[Path, str | None]:
    step = run / "checkpoints" / "step-8"
    file = step / ".metadata"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"TensorStorageMetadata", b"TensorStoragePickled!"))
    assert len(file.read_bytes()) == len(whole)
    return step, None


REFUSED: list[tuple[str, Callable[[Path, Path], tuple[Path, str | None]], str]] = [
    ("no folder", lambda run, folder: (folder / "nowhere", None), "holds no checkpoint; give a step-N folder"),
    ("empty folder", lambda run, folder: (folder, None), "holds no checkpoint"),
    ("moved weights", lambda run, folder: (run, str(folder / "gone")), "gone.*no such folder"),
    ("other weights", _other_weights, "checkpoint_dir=.*other weights than those"),
    ("truncated", _truncated, "step-8 is damaged: __0_0.distcp has 99 of"),
    ("foreign metadata", _foreign_metadata, "step-8 is damaged: .metadata: its content differs"),
]


@pytest.mark.parametrize(("prepare", "message"), [pytest.param(*case[1:], id=case[0]) for case in REFUSED])
def test_refused(
    run: Path, tmp_path: Path, prepare: Callable[[Path, Path], tuple[Path, str | None]], message: str
) -> None:
    checkpoint, weights = prepare(run, tmp_path)
    with pytest.raises(ConfigError, match=message):
        consolidate(checkpoint, tmp_path / "out", checkpoint_dir=weights)
    assert not (tmp_path / "out").exists()


def test_a_full_disk(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    consolidate(run, tmp_path / "out")
    before = tree(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(consolidation, "save_hf_folder", full)
    with pytest.raises(NotSavedError, match="No space left on device.*make room"):
        consolidate(run, tmp_path / "out")
    assert tree(tmp_path) == before
