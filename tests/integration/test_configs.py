"""Every file in ``configs/`` loads, builds its model without memory, and names components that a plain install has."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torchtune.config._utils import _get_component_from_path

from lrdint_tune.attention import METHODS
from lrdint_tune.training.components import build, build_model
from lrdint_tune.training.config import TrainConfig, load_config
from lrdint_tune.training.trainable import optimizer_groups, set_trainable

FOLDER = Path(__file__).parents[2] / "configs"
# Of full_finetune_distributed; those of finetune_transformers are in test_transformers_recipe.py.
FILES = [file for file in sorted(FOLDER.glob("*.yaml")) if "lrdint_tune/full_finetune_distributed" in file.read_text()]

# Of what `pip install lrdint-tune` brings (pyproject.toml), the packages with components of use.
RUNTIME = {"torch", "torchtune", "transformers", "lrdint_tune"}


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def file(request: pytest.FixtureRequest) -> Path:
    return request.param


def load(file: Path) -> TrainConfig:
    return load_config(yaml.safe_load(file.read_text()))


def components(section: Any) -> list[str]:
    if not isinstance(section, dict):
        return []
    own = [section["_component_"]] if "_component_" in section else []
    return own + [path for value in section.values() for path in components(value)]


def test_the_set_is_complete() -> None:
    assert {file.stem for file in FILES} >= {
        "quickstart",
        "llama3_2_1b_dint",
        "llama3_2_1b_baseline",
        "llama3_2_3b_dint",
        "llama3_1_8b_dint",
        "llama3_1_8b_daa",
        "llama3_1_8b_dex",
        *(f"llama3_2_1b_{method}" for method in METHODS if method != "none"),
        *(f"{base}_lorada_{kind}" for base in ("llama3_8b", "llama_7b", "llama2_7b") for kind in ("la", "q")),
    }


def test_model_builds(file: Path) -> None:
    cfg = load(file)
    model = build_model(cfg, total_steps=100)
    set_trainable(model, cfg.trainable)
    assert all(p.is_meta for p in model.parameters())
    assert all(p.requires_grad for p in model.adapter_parameters().values())
    assert bool(model.adapter_parameters()) != model.spec.is_stock
    has_lambda = any(group.get("lr") == cfg.lam_lr for group in optimizer_groups(model, lam_lr=cfg.lam_lr))
    assert has_lambda or cfg.lam_lr is None, "lam_lr has no effect"


def test_components_come_with_the_package(file: Path) -> None:
    for path in components(yaml.safe_load(file.read_text())):
        assert path.split(".")[0] in RUNTIME, path


def test_optimizer_and_schedule_build(file: Path) -> None:
    cfg = load(file)
    optimizer = build("optimizer", cfg.optimizer, [{"params": [torch.nn.Parameter(torch.ones(2, 2))]}])
    assert cfg.lr_scheduler is not None
    schedule = build("lr_scheduler", cfg.lr_scheduler, optimizer, num_training_steps=1000)
    for _ in range(1000):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


def test_datasets_and_tokenizer_take_their_options(file: Path) -> None:
    cfg = load(file)
    assert cfg.dataset_val is not None
    for section in (cfg.dataset, cfg.dataset_val):
        options = {key: value for key, value in section.items() if key not in ("_component_", "packed")}
        inspect.signature(_get_component_from_path(section["_component_"])).bind("tokenizer", max_seq_len=8, **options)
    options = {key: value for key, value in cfg.tokenizer.items() if key != "_component_"}
    inspect.signature(_get_component_from_path(cfg.tokenizer["_component_"])).bind(**options)


def test_header_names_the_command(file: Path) -> None:
    header = file.read_text().split("\noutput_dir:")[0]
    assert f"--config configs/{file.name}" in header
    assert "tune run" in header


@pytest.mark.parametrize(
    "name",
    ["baseline", *(f.stem.removeprefix("llama3_2_1b_") for f in FILES if "control" in f.stem)],
)
def test_controls_are_the_same_training(name: str) -> None:
    dint, control = (yaml.safe_load((FOLDER / f"llama3_2_1b_{n}.yaml").read_text()) for n in ("dint", name))
    if name == "baseline":
        assert control["model"] == {"_component_": "lrdint_tune.models.llama3_2_1b", "method": "none"}
        assert control["trainable"] == dint["trainable"]
    for config in (dint, control):
        for key in ("model", "output_dir", "lam_lr", "trainable"):
            config.pop(key, None)
    assert control == dint


def test_lora_control_has_as_many_parameters() -> None:
    counts = []
    for name in ("control_lora", "control_dint_adapter"):
        cfg = load(FOLDER / f"llama3_2_1b_{name}.yaml")
        model = build_model(cfg, total_steps=100)
        set_trainable(model, cfg.trainable)
        counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
    assert counts == [16 * 672_256, 16 * 675_872]
