"""What the README tells a newcomer to type exists and is accepted."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import lrdint_tune.models
from lrdint_tune.consolidate import ConsolidateConfig
from lrdint_tune.evaluation.config import EvaluateConfig, ReportConfig
from lrdint_tune.models import llama3_2
from lrdint_tune.planning.options import PlanOptions
from lrdint_tune.training.config import load_config
from tests.common.tiny_run import SIZES, write_model

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text() + "\n" + (ROOT / "CONTRIBUTING.md").read_text()
# Indented code, with a backslash continuing a line, and commands in running text between backticks.
CODE = [line.strip() for line in re.sub(r"\\\n\s*", "", TEXT).splitlines() if line.startswith("    ")]
COMMANDS = CODE + re.findall(r"`((?:make|python|tune|torchrun) [^`]+)`", TEXT)


def commands(start: str) -> list[str]:
    found = sorted({c.split("  #")[0].split("   #")[0].strip() for c in COMMANDS if c.startswith(start)})
    assert found, f"the documents name no command that starts with {start!r}"
    return found


def test_make_targets_exist() -> None:
    for command in commands("make "):
        target = shlex.split(command)[1]
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--config " in c])
def test_commands_with_a_config(command: str) -> None:
    words = shlex.split(command.split("   #")[0])
    recipe = next(w for w in words if w.startswith("lrdint_tune"))
    assert importlib.util.find_spec(recipe.replace("/", ".")) is not None
    config = OmegaConf.load(ROOT / words[words.index("--config") + 1])
    overrides = [w for w in words[words.index("--config") + 2 :] if "=" in w]
    if recipe.endswith("consolidate"):
        load_config(OmegaConf.merge(config, OmegaConf.from_dotlist(overrides)), ConsolidateConfig)
        return
    if recipe.endswith("evaluate"):
        load_config(OmegaConf.merge(config, OmegaConf.from_dotlist(overrides)), EvaluateConfig)
        return
    if recipe.endswith("report"):
        load_config(OmegaConf.merge(config, OmegaConf.from_dotlist(overrides)), ReportConfig)
        return
    if recipe.endswith("plan"):
        own = [w for w in overrides if w.split("=")[0] in {f.name for f in dataclasses.fields(PlanOptions)}]
        load_config(OmegaConf.from_dotlist(own), PlanOptions)
        overrides = [w for w in overrides if w not in own]
    load_config(OmegaConf.merge(config, OmegaConf.from_dotlist(overrides)))
    assert "--nnodes" not in words or "--rdzv_endpoint" in words


@pytest.mark.slow
def test_modules_run() -> None:
    for command in commands("python -m "):
        module = shlex.split(command)[2]
        done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_override_lines_are_config_keys() -> None:
    config = OmegaConf.load(ROOT / "configs" / "llama3_2_1b_dint.yaml")
    lines = [c for c in CODE if c.startswith("... ")]
    assert lines
    for line in lines:
        overrides = OmegaConf.from_dotlist(shlex.split(line)[1:])
        checked = load_config(OmegaConf.merge(config, overrides))
        assert checked.dataset["source"] == "json" and checked.dataset_val is not None


def test_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as it stands, on a model of another size."""
    block = re.search(r"In Python:\n\n((?:    .*\n|\n)+)", TEXT)
    assert block is not None
    code = "\n".join(line[4:] for line in block[1].splitlines())
    monkeypatch.setattr(lrdint_tune.models, "smollm2_135m", lambda **options: llama3_2(**SIZES, **options))
    monkeypatch.chdir(tmp_path)
    model = write_model(tmp_path / "quickstart_output" / "run" / "hf", method="dint", rank=8)
    scope: dict[str, object] = {}
    exec(code, scope)  # the document is ours
    loaded = scope["model"]
    assert isinstance(loaded, lrdint_tune.models.LlamaDecoder)
    for name, tensor in model.state_dict().items():
        assert tensor.equal(loaded.state_dict()[name]), name
    shutil.rmtree(tmp_path / "quickstart_output")


def test_links_and_pictures_exist() -> None:
    for path in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / path).exists(), path


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"@[A-Z0-9]+@", TEXT)
