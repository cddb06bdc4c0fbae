"""The scripts of recipes/reproduce: each run's config is one the recipe takes; an experiment goes on where it was."""

import dataclasses
import importlib.util
import json
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from lrdint_tune.errors import ConfigError
from lrdint_tune.launching.options import compose, parse
from lrdint_tune.reproduce import runs as runs_module
from lrdint_tune.reproduce.gate import registered
from lrdint_tune.reproduce.runs import (
    Experiment,
    Run,
    as_written,
    load_preset,
    read_json,
    refuse_others,
    run_config,
    run_experiment,
)
from lrdint_tune.training.components import accumulation_steps, build_model
from lrdint_tune.training.config import TrainConfig, load_config
from lrdint_tune.training.interruption import Interruption
from lrdint_tune.training.job import Job
from lrdint_tune.training.pulse import Pulse
from lrdint_tune.training.world import World, end_world, start_world
from tests.common.tiny_run import write_run
from tests.integration.kill_ranks import REPOSITORY

SCRIPTS = REPOSITORY / "recipes" / "reproduce"
EXPERIMENTS = ("leak", "methods", "ablations")
PRESETS = sorted(file.stem for file in (SCRIPTS / "presets").glob("*.yaml"))
CASES = [
    (experiment, preset)
    for preset in PRESETS
    for experiment in EXPERIMENTS
    if experiment in yaml.safe_load((SCRIPTS / "presets" / f"{preset}.yaml").read_text())["experiments"]
]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"reproduce_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("experiment, preset", CASES, ids=["-".join(case) for case in CASES])
def test_every_run_is_a_config_of_the_recipe(experiment: str, preset: str, tmp_path: Path) -> None:
    loaded = load_preset(preset, experiment, tmp_path)
    names = []
    for run in script(experiment).runs(preset):
        cfg = load_config(OmegaConf.create(run_config(loaded, experiment, run, 0, tmp_path)))
        with registered():
            build_model(cfg)
        for ranks in (8, 16, 64) if preset == "llama3_2_1b" else (1,):
            assert accumulation_steps(cfg, ranks) >= 1
        names.append(run.name)
    assert len(names) == len(set(names)) > 4


def test_lora_has_as_many_parameters_as_dint(tmp_path: Path) -> None:
    module = script("methods")
    for preset in module.LORA_RANK:
        loaded = load_preset(preset, "methods", tmp_path)
        by_name = {run.name: run for run in module.runs(preset)}
        new = []
        for name in ("control_lora", "control_dint_adapter"):
            cfg = load_config(OmegaConf.create(run_config(loaded, "methods", by_name[name], 0, tmp_path)))
            new.append(sum(p.numel() for p in build_model(cfg).adapter_parameters().values()))
        assert new[0] == pytest.approx(new[1], rel=0.006), preset


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A preset of the tiny random model, in place of the real ones."""
    config = yaml.safe_load(write_run(tmp_path / "run", epochs=1, max_steps_per_epoch=3).read_text())
    held_out = config.pop("dataset_val")
    for key in ("output_dir", "save_every_n_steps"):
        config.pop(key)
    preset = {
        "prepare": "none",
        "config": config,
        "held_out": held_out,
        "forgetting": {"other": {**held_out, "num_rows": 4}},
        "experiments": {"trial": {"dataset_val": held_out, "prefix_wise_positions": 16}},
    }
    folder = tmp_path / "presets"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(yaml.safe_dump(preset))
    monkeypatch.setattr(runs_module, "PRESETS", folder)
    return tmp_path


def options(folder: Path, **changes: Any) -> Namespace:
    values = {
        "preset": "tiny",
        "data_dir": None,
        "work_dir": folder / "work",
        "results_dir": folder / "results",
        "seeds": [0],
        "only": None,
        "overrides": [],
    }
    return Namespace(**{**values, **changes})


LITERAL = {"model.integral": "sequence", "model.allow_future_leak": True}


class QuietJob(Job):
    """Leaves the signals to pytest, and watches nobody."""

    def __init__(self) -> None:
        self.interruption, self.pulse = Interruption(), Pulse()

    def start_world(self, cfg: TrainConfig) -> World:
        return start_world(cfg.device, **cfg.mesh_dims)


@pytest.fixture
def job() -> Iterator[Job]:
    yield QuietJob()
    end_world()


def test_an_experiment_goes_on_where_it_was(tiny: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment("trial", lambda preset: [Run("dint"), Run("literal", LITERAL, keep=True)])
    run_experiment(experiment, options(tiny, only=["dint"]), job)
    results = tiny / "results" / "trial" / "tiny"
    first = (results / "dint-seed0.json").read_bytes()
    run_experiment(experiment, options(tiny, seeds=[0, 1]), job)
    assert (results / "dint-seed0.json").read_bytes() == first
    assert {file.stem for file in results.glob("*")} == {f"{r}-seed{s}" for r in ("dint", "literal") for s in (0, 1)}

    record = json.loads((results / "literal-seed1.json").read_text())
    assert record["config"]["seed"] == 1 and record["config"]["model"]["integral"] == "sequence"
    assert record["versions"]["torch"] and record["command"]
    assert len(record["curves"]["loss_metrics/global_avg_loss"]) == record["steps"] == 3
    leaks = dict(record["curves"]["validation_metrics/leak"])
    assert leaks[0] == pytest.approx(0, abs=1e-5) and set(leaks) == {0, 3}
    assert all(abs(v) < 1e-5 for _, v in json.loads(first)["curves"]["validation_metrics/leak"])
    for losses in (record["held_out"], record["forgetting"]["other"]):
        assert losses["mean"] == pytest.approx(sum(losses["sums"]) / sum(losses["counts"]), rel=1e-5)
    assert record["new_parameters"] < record["trainable_parameters"]
    # What is measured on the model afterwards is kept, the rest is not.
    work = tiny / "work" / "tiny" / "trial"
    assert (work / "literal-seed0").is_dir() and not (work / "dint-seed0").exists()

    monkeypatch.chdir(tiny)
    done = subprocess.run(
        [sys.executable, SCRIPTS / "results.py", "--results_dir", tiny / "results", "--document", tiny / "none.md"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_result_of_other_settings_is_not_taken_for_this_one(tiny: Path, job: Job) -> None:
    experiment = Experiment("trial", lambda preset: [Run("dint")])
    run_experiment(experiment, options(tiny), job)
    run_experiment(experiment, options(tiny, work_dir=tiny / "elsewhere"), job)  # paths are no settings
    with pytest.raises(ConfigError, match=r"lam_lr=0\.5: .*dint-seed0\.json was measured with 0\.01"):
        run_experiment(experiment, options(tiny, overrides=["lam_lr=0.5"]), job)
    with pytest.raises(ConfigError, match=r"model\.rank=2: .*dint-seed0\.json was measured with 3"):
        run_experiment(experiment, options(tiny, overrides=["model.rank=2"]), job)
    with pytest.raises(ConfigError, match=r"model\.lam=fixed: .*dint-seed0\.json was measured with None"):
        run_experiment(experiment, options(tiny, overrides=["model.lam=fixed"]), job)


def test_committed_results_are_of_the_settings_that_the_scripts_have() -> None:
    """Else a table would hold what its command does not measure, and the command would be refused."""
    compared = 0
    for experiment, preset in CASES:
        work = (REPOSITORY / "output" / preset).absolute()
        loaded = load_preset(preset, experiment, work)
        for run in script(experiment).runs(preset):
            for file in (REPOSITORY / "docs" / "results" / experiment / preset).glob(f"{run.name}-seed[0-9].json"):
                cfg = load_config(OmegaConf.create(run_config(loaded, experiment, run, int(file.stem[-1]), work)))
                refuse_others(
                    file, read_json(file)["config"], as_written(dataclasses.asdict(cfg), {str(work): "${work_dir}"})
                )
                compared += 1
    assert compared > 200


def test_a_run_of_other_settings_is_not_taken_for_this_one(tiny: Path, job: Job) -> None:
    """The folder of a kept model has a checkpoint, which a run would go on from."""
    experiment = Experiment("trial", lambda preset: [Run("dint", keep=True)])
    run_experiment(experiment, options(tiny), job)
    file = tiny / "results" / "trial" / "tiny" / "dint-seed0.json"
    first = file.read_bytes()
    file.unlink()
    with pytest.raises(ConfigError, match="dint-seed0 holds a run of other or unknown settings"):
        run_experiment(experiment, options(tiny, overrides=["lam_lr=0.5"]), job)
    assert not file.exists()
    run_experiment(experiment, options(tiny), job)  # its own checkpoint
    again, before = json.loads(file.read_bytes()), json.loads(first)
    assert again["held_out"] == before["held_out"] and again["curves"] == before["curves"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"preset": "gpt5"}, "--preset gpt5: unknown; choose from tiny"),
        ({"only": ["daa"]}, "--only daa: no such run; there are dint"),
        ({"overrides": ["learning_rate=1"]}, "unknown key learning_rate=1"),
    ],
)
def test_bad_options(tiny: Path, job: Job, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_experiment(Experiment("trial", lambda preset: [Run("dint")]), options(tiny, **changes), job)


def test_a_preset_without_the_experiment(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="--preset tiny: has no settings for leak"):
        load_preset("tiny", "leak", tiny)


@pytest.mark.parametrize("options", [("--seeds", "0", "1"), ("--seeds", "0", "--preset", "letters")])
def test_cluster_script_prints_a_command_that_the_launcher_takes(options: tuple[str, ...]) -> None:
    cluster = SCRIPTS / "cluster.sbatch"
    done = subprocess.run(
        ["bash", cluster, "leak", *options],
        env={"PATH": "/usr/bin:/bin", "DRY_RUN": "1", "NPROC_PER_NODE": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = shlex.split(done.stdout)
    config, program, arguments = compose(parse(words[words.index("lrdint_tune.launch") + 1 :]))
    assert config.nproc_per_node == 2
    preset = () if "--preset" in options else ("--preset", "llama3_2_1b")
    assert " ".join(arguments).endswith(" ".join(("recipes/reproduce/leak.py", *preset, *options)))
