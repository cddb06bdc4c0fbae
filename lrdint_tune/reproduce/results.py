"""Reading result files back: the runs of an experiment, differences to a baseline, and the leak along a run."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.statistics import Difference, paired_bootstrap_over_seeds

Results = dict[str, dict[int, dict[str, Any]]]


def load_results(folder: Path) -> Results:
    """``run -> seed -> record`` of the files that ``runs.py`` wrote into ``folder``; empty if it is not there."""
    found: Results = defaultdict(dict)
    for file in sorted(folder.glob("*-seed*.json")):
        record = json.loads(file.read_text())
        found[record["run"]][record["seed"]] = record
    return dict(found)


def difference(results: Results, run: str, baseline: str, *path: str) -> Difference:
    """``run`` minus ``baseline`` in NLL per token, over the seeds both have and the same documents.

    Args:
        path: of the document losses in a record: ``held_out``, or ``forgetting`` and the name.

    Raises:
        ConfigError: they have no seed in common, or other documents.
    """
    seeds = sorted(set(results[run]) & set(results[baseline]))
    if not seeds:
        raise ConfigError(f"{run} and {baseline}: no seed in common; run both with the same --seeds")
    sums, counts = [], []
    for name in (run, baseline):
        losses = [_at(results[name][seed], path) for seed in seeds]
        sums.append(np.array([loss["sums"] for loss in losses]))
        counts += [loss["counts"] for loss in losses]
    if any(count != counts[0] for count in counts):
        raise ConfigError(f"{run} and {baseline}: measured on different documents; run both again")
    return paired_bootstrap_over_seeds(sums[0], sums[1], np.array(counts[0], np.float64))


def mean_over_seeds(results: Results, run: str, *path: str) -> tuple[float, float]:
    """Mean of a number over seeds, and the sample's standard deviation (NaN for one seed)."""
    values = [float(_at(record, path)) for record in results[run].values()]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def final_lambda(record: dict[str, Any]) -> tuple[float, float, float] | None:
    """Mean, lowest and highest over layers of the last recorded mean λ; None where there is none."""
    last = [points[-1][1] for tag, points in record["curves"].items() if tag.startswith("lambda_mean/")]
    return (float(np.mean(last)), min(last), max(last)) if last else None


@dataclass(frozen=True)
class Curve:
    """A quantity along the run, over seeds.

    Attributes:
        steps: int ``[points]``.
        mean: ``[points]``.
        half_width: of the 95 % interval, ``[points]``.
    """

    steps: np.ndarray
    mean: np.ndarray
    half_width: np.ndarray


def curve(records: list[dict[str, Any]], tag: str, *, smooth: int = 1) -> Curve:
    """A recorded scalar, its mean over seeds.

    The interval is 1.96 standard errors: of the differences between seeds, and, where the run recorded
    ``<tag>_stderr``, of the measurement too.

    Args:
        smooth: average over so many points, none of them twice.
    """
    values, errors, steps = [], [], np.empty(0)
    for record in records:
        points = np.array(record["curves"][tag], np.float64)
        usable = len(points) // smooth * smooth
        steps = points[:usable, 0].reshape(-1, smooth).max(1)
        values.append(points[:usable, 1].reshape(-1, smooth).mean(1))
        if f"{tag}_stderr" in record["curves"]:
            errors.append(np.array(record["curves"][f"{tag}_stderr"], np.float64)[:, 1])
    stacked = np.stack(values)
    seeds = len(stacked)
    variance = stacked.var(0, ddof=1) / seeds if seeds > 1 else np.zeros(stacked.shape[1])
    if errors:
        variance = variance + (np.stack(errors) ** 2).mean(0) / seeds
    return Curve(steps.astype(int), stacked.mean(0), 1.96 * np.sqrt(variance))


@dataclass(frozen=True)
class Split:
    """What the literal form gains over ``none`` at the end of the run, in nats per token, and what becomes of it.

    Attributes:
        training_loss: gain in the recorded training loss, mean of the last tenth of the steps.
        teacher_forced: gain at the chosen positions of training rows (held-out ones), teacher-forced.
        prefix_wise: gain at the same positions predicted from prefixes alone: what survives.
        leak, leak_half_width: teacher-forced minus prefix-wise gain, with the half width of its 95 % interval.
    """

    training_loss: float
    teacher_forced: float
    prefix_wise: float
    leak: float
    leak_half_width: float


def split(results: Results, literal: str, none: str, group: str) -> Split:
    """Split the literal form's gain.

    Args:
        group: ``training_rows`` or ``validation_metrics``: which positions.
    """
    ours, base = list(results[literal].values()), list(results[none].values())
    tail = max(1, len(base[0]["curves"]["loss_metrics/global_avg_loss"]) // 10)

    def loss(records: list[dict[str, Any]]) -> float:
        return float(
            np.mean([[value for _, value in r["curves"]["loss_metrics/global_avg_loss"][-tail:]] for r in records])
        )

    leak = curve(ours, f"{group}/leak")
    # `none` is causal: its loss at fewer positions would be another sample, its leak is 0.
    whole = "validation_metrics/loss" if group == "validation_metrics" else "loss_metrics/global_avg_loss"
    if group == "validation_metrics":
        gain = curve(base, whole).mean[-1] - curve(ours, whole).mean[-1]
    else:
        gain = loss(base) - loss(ours)
    return Split(
        training_loss=loss(base) - loss(ours),
        teacher_forced=float(gain),
        prefix_wise=float(gain - leak.mean[-1]),
        leak=float(leak.mean[-1]),
        leak_half_width=float(leak.half_width[-1]),
    )


def _at(record: dict[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = record
    for key in path:
        value = value[key]
    return value
