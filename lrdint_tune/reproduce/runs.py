"""Running an experiment: many training runs of the recipe in one process, each with a JSON file of what came out.

A run whose file is there is not repeated, so an experiment that was stopped goes on where it was. Under torchrun every
rank runs the same list.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torchao
import torchtune
import transformers
from omegaconf import OmegaConf

from lrdint_tune import __version__
from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.nll import Rows, document_nll
from lrdint_tune.export.atomic import atomic_text
from lrdint_tune.reproduce.materials import prepare
from lrdint_tune.training.components import build_loader, build_tokenizer
from lrdint_tune.training.config import TrainConfig, load_config
from lrdint_tune.training.job import Job
from lrdint_tune.training.trainer import Trainer
from lrdint_tune.training.world import World

log = logging.getLogger(__name__)

PRESETS = Path(__file__).parents[2] / "recipes" / "reproduce" / "presets"
RESULT_DIGITS = 7  # significant ones of the numbers in result files


@dataclass(frozen=True)
class Run:
    """One cell of an experiment.

    Attributes:
        name: of its folder and result files.
        changes: dotted config keys over the preset's, ``model.method: dint``.
        keep: keep the exported model in the work folder, for what is measured on it afterwards.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    keep: bool = False


@dataclass(frozen=True)
class Experiment:
    """What a script runs.

    Attributes:
        name: of its folder of results, and of the preset's section with its settings.
        runs: from the preset's name to its runs.
    """

    name: str
    runs: Callable[[str], Iterable[Run]]


@dataclass(frozen=True)
class Preset:
    """A model with its data: a file of recipes/reproduce/presets.

    Attributes:
        config: the recipe's keys.
        held_out: dataset section of what a finished run is measured on.
        forgetting: name -> dataset section of other data, whose loss should not rise.
    """

    name: str
    config: dict[str, Any]
    held_out: dict[str, Any]
    forgetting: dict[str, dict[str, Any]]


def command_line(experiment: Experiment, description: str | None) -> None:
    """Run ``experiment`` as the command line says, in this process (or this rank)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="stories260k", help=f"one of {', '.join(sorted(_preset_names()))}")
    parser.add_argument("--data_dir", type=Path, help="the public files, see recipes/reproduce/README.md")
    parser.add_argument("--work_dir", type=Path, default=Path("output/reproduce"), help="models, caches, logs")
    parser.add_argument("--results_dir", type=Path, default=Path("docs/results"), help="JSON files of finished runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="names of runs")
    parser.add_argument("overrides", nargs="*", help="key=value over every run's config")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    job = Job()
    sys.exit(job.run(lambda: run_experiment(experiment, options, job)))


def run_experiment(experiment: Experiment, options: argparse.Namespace, job: Job) -> None:
    """Every run that has no result file yet, seed by seed.

    Raises:
        ConfigError: an unknown preset or run, missing data, a config the recipe refuses, or a result file or work
            folder of other settings.
    """
    work = (options.work_dir / options.preset).absolute()
    preset = load_preset(options.preset, experiment.name, work)
    runs = list(experiment.runs(options.preset))
    unknown = set(options.only or []) - {run.name for run in runs}
    if unknown:
        raise ConfigError(
            f"--only {' '.join(sorted(unknown))}: no such run; there are {', '.join(r.name for r in runs)}"
        )
    results = options.results_dir / experiment.name / options.preset
    # A result file says nothing of the machine's folders.
    places = {str(work): "${work_dir}"}
    if options.data_dir is not None and options.data_dir.is_absolute():
        places[str(options.data_dir)] = "DATA"
    world: World | None = None
    for seed in options.seeds:
        for run in runs:
            if options.only and run.name not in options.only:
                continue
            file = results / f"{run.name}-seed{seed}.json"
            cfg = load_config(run_config(preset, experiment.name, run, seed, work, options.overrides))
            if file.is_file():
                refuse_others(file, read_json(file)["config"], as_written(dataclasses.asdict(cfg), places))
                log.info("%s: already there", file)
                continue
            if world is None:
                world = _start(options, cfg, work, job)
            world.on_main(partial(claim, cfg))
            outcome = _one(preset, cfg, world, job)
            if world.is_main:
                results.mkdir(parents=True, exist_ok=True)
                record = {"experiment": experiment.name, "preset": options.preset, "run": run.name, "seed": seed}
                write_json(file, {**record, **outcome}, places)
                log.info("%s: held-out NLL %.4f", file, outcome["held_out"]["mean"])
                if not run.keep:
                    shutil.rmtree(cfg.output_dir, ignore_errors=True)
            gc.collect()


def claim(cfg: TrainConfig) -> None:
    """Note in the run's work folder whose it is: the checkpoint of a run with another config, such as another
    ``key=value``, would be resumed as this run's own. Other paths are another config too.

    Raises:
        ConfigError: the folder holds a checkpoint of another config, or of one that is not noted.
    """
    folder = Path(cfg.output_dir)
    file = folder / "experiment.json"
    text = json.dumps(dataclasses.asdict(cfg), sort_keys=True)
    if (folder / "checkpoints").is_dir() and (not file.is_file() or file.read_text(encoding="utf-8") != text):
        raise ConfigError(
            f"--work_dir: {folder} holds a run of other or unknown settings; remove it, or give another --work_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    atomic_text(file, text)


def load_preset(name: str, experiment: str, work: Path) -> Preset:
    """Read a preset and put the settings for ``experiment`` over its config; ``forgetting`` among them replaces the
    preset's.

    Raises:
        ConfigError: there is no such preset, or it is not made for the experiment.
    """
    loaded = _preset_values(name)
    loaded["work_dir"] = str(work)
    values = OmegaConf.to_container(loaded, resolve=True)
    assert isinstance(values, dict)
    if experiment not in values["experiments"]:
        raise ConfigError(f"--preset {name}: has no settings for {experiment}; choose another preset")
    settings = values["experiments"][experiment]
    forgetting = settings.pop("forgetting", values["forgetting"])
    config = {**values["config"], **settings}
    return Preset(name, config, config.get("dataset_val") or values["held_out"], forgetting)


def run_config(
    preset: Preset, experiment: str, run: Run, seed: int, work: Path, overrides: Iterable[str] = ()
) -> dict[str, Any]:
    """The recipe's config of one run."""
    config: Any = OmegaConf.create(preset.config)
    for key, value in run.changes.items():
        OmegaConf.update(config, key, value, merge=False)
    config["seed"] = seed
    config["output_dir"] = str(work / experiment / f"{run.name}-seed{seed}")
    config = OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides)))
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _start(options: argparse.Namespace, cfg: TrainConfig, work: Path, job: Job) -> World:
    """Materials first, by one process; then the process group."""
    if int(os.environ.get("RANK", "0")) == 0:
        prepare(_preset_values(options.preset)["prepare"], options.data_dir, work / "materials")
    threads = preset_threads(options.preset)
    if threads:
        torch.set_num_threads(threads)
    return job.start_world(cfg)


def _one(preset: Preset, cfg: TrainConfig, world: World, job: Job) -> dict[str, Any]:
    """Train one run and measure it."""
    start = time.time()
    trainer = Trainer(cfg, world, interruption=job.interruption, pulse=job.pulse)
    # Before the training, which would be lost by data that cannot be used.
    held_out = documents(trainer, "held_out", preset.held_out)
    others = {name: documents(trainer, name, section) for name, section in preset.forgetting.items()}
    trainer.train()
    curves = read_curves(trainer)
    return {
        "held_out": measured(trainer, held_out),
        "forgetting": {name: measured(trainer, rows) for name, rows in others.items()},
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "new_parameters": sum(p.numel() for p in trainer.model.adapter_parameters().values()),
        "steps": trainer.total_steps,
        "tokens_per_step": trainer.global_batch * cfg.max_seq_len,
        "curves": curves,
        "seconds": round(time.time() - start, 1),
        "processes": world.size,
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "versions": versions(),
        "config": dataclasses.asdict(cfg),
    }


def documents(trainer: Trainer, key: str, section: dict[str, Any]) -> Rows:
    """The documents of a dataset section. Raises ConfigError if they cannot be used with the run's ``max_seq_len``."""
    tokenizer = build_tokenizer(trainer.cfg.tokenizer)
    return build_loader(key, section, trainer.cfg, trainer.world, tokenizer).dataset.documents()


def measured(trainer: Trainer, rows: Rows) -> dict[str, Any]:
    """Teacher-forced NLL per token, and of every document its sum and count, for pairing."""
    trainer.pulse.enter("held-out documents", trainer.step, watch=True)
    between = trainer.between_validation_batches
    loss = document_nll(trainer.model, rows, device=trainer.world.device, between=between)
    return {**loss.estimate().as_dict(), "sums": loss.sums.tolist(), "counts": loss.counts.astype(int).tolist()}


def read_curves(trainer: Trainer) -> dict[str, list[tuple[int, float]]]:
    """``tag -> [(step, value), ...]`` of what the run recorded that the figures and tables need."""
    wanted = ("loss_metrics/global_avg_loss", "validation_metrics/", "training_rows/", "lambda_mean/")
    return {tag: points for tag, points in trainer.recorder.histories().items() if tag.startswith(wanted)}


def one_process() -> None:
    """End the process if it is one of several: for scripts that do not share their work."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        sys.exit(f"error: WORLD_SIZE={size}: this script runs in one process; start it without torchrun")


def end_with(main: Callable[[], None]) -> NoReturn:
    """Call ``main`` and end the process as the recipes do: what was wrong with the input is one line."""
    try:
        main()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit()


def versions() -> dict[str, str]:
    """Of what computed a result."""
    return {
        "lrdint_tune": __version__,
        "torch": torch.__version__,
        "torchtune": torchtune.__version__,
        "torchao": torchao.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def write_json(file: Path, record: dict[str, Any], places: Mapping[str, str] | None = None) -> None:
    """Complete or not at all, numbers to ``RESULT_DIGITS`` digits, folders by the names that ``places`` gives them."""
    atomic_text(file, _text(record, places or {}))


def as_written(record: dict[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """What :func:`read_json` would give if :func:`write_json` had written it."""
    return json.loads(_text(record, places))


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _text(record: dict[str, Any], places: Mapping[str, str]) -> str:
    text = json.dumps(_rounded(record)) + "\n"
    for place, name in places.items():
        text = text.replace(place, name)
    return text


def refuse_others(file: Path, had: Mapping[str, Any], has: Mapping[str, Any]) -> None:
    """A finished result is not measured again, so it must be of the settings that are asked for.

    Args:
        file: for the message.
        had: its settings; a key that only one of the two knows belongs to another version, and is not compared.
        has: those that are asked for, as they would be written.

    Raises:
        ConfigError: they differ.
    """
    both = [key for key in had if key in has]
    if different := _first_difference({key: had[key] for key in both}, {key: has[key] for key in both}):
        name, old, new = different
        raise ConfigError(
            f"{name}={new}: {file} was measured with {old} and would not be measured again; give another folder for "
            f"results, or remove the file"
        )


def _first_difference(old: Any, new: Any, at: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        found = (_first_difference(old.get(key), new.get(key), f"{at}.{key}" if at else key) for key in keys)
        return next(filter(None, found), None)
    return None if old == new else (at, old, new)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{RESULT_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def preset_threads(name: str) -> int | None:
    """How many threads torch should take with a preset; None: as many as it likes."""
    return _preset_values(name).get("max_threads")


def _preset_values(name: str) -> Any:
    file = PRESETS / f"{name}.yaml"
    if not file.is_file():
        raise ConfigError(f"--preset {name}: unknown; choose from {', '.join(sorted(_preset_names()))}")
    return OmegaConf.load(file)


def _preset_names() -> list[str]:
    return [file.stem for file in PRESETS.glob("*.yaml")]
