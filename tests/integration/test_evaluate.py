"""A run's folders are evaluated as the run itself left them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.loading import load_model
from lrdint_tune.models.hf import iter_hf_folder
from tests.integration.runs import finished_run

TOKENS = torch.arange(60)[None]


def test_run_checkpoint_adapter_and_hf_are_one_model(finished: Path) -> None:
    with torch.no_grad():
        logits = {
            name: load_model(finished / name).model(TOKENS) for name in ("", "checkpoints/step-8", "adapter", "hf")
        }
        earlier = load_model(finished / "checkpoints" / "step-6").model(TOKENS)
    assert all(torch.equal(other, logits["hf"]) for other in logits.values())
    assert not torch.equal(earlier, logits["hf"])


def test_what_the_run_left_is_found_without_its_checkpoints(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    loaded = load_model(folder)
    assert loaded.folder == folder / "hf"
    stored = dict(iter_hf_folder(folder / "hf", loaded.model.spec))
    assert all(torch.equal(stored[name], tensor) for name, tensor in loaded.model.state_dict().items())


def test_another_base_is_refused(finished: Path, tmp_path: Path) -> None:
    loaded = load_model(finished)
    base = Path(shutil.copytree(str(loaded.base), tmp_path / "base"))
    file = base / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000:] = bytes(1000)
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="other weights than those"):
        load_model(finished, base_model=str(base))


def test_a_model_that_leaks_is_loaded_from_its_checkpoint(config: Path, tmp_path: Path) -> None:
    """It is never exported, but its leak can be measured."""
    keys = ("model.integral=sequence", "model.allow_future_leak=true", "epochs=1", "max_steps_per_epoch=1")
    finished_run(config, f"output_dir={tmp_path / 'run'}", *keys, "save_every_n_steps=1")
    loaded = load_model(tmp_path / "run")
    assert loaded.model.spec.leaks_future
    assert json.loads((loaded.folder / "train_state.json").read_text())["spec"]["method"] == "dint"
