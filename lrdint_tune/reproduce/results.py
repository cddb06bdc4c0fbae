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
from lrdint_tune.evaluation.statistics import Difference, half_width_over_seeds, paired_over_seeds

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
    return paired_over_seeds(sums[0], sums[1], np.array(counts[0], np.float64))


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

    The half width is ``sqrt((1.96 e)^2 + s^2)``: ``s`` that of the mean over seeds (Student's t), ``e`` the standard
    error that the run recorded as ``<tag>_stderr``. All seeds are measured at the same positions, so more of them do
    not lessen ``e``.

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
    half = np.array([half_width_over_seeds(column) for column in stacked.T])
    if errors:
        half = np.hypot(half, 1.96 * np.stack(errors).mean(0))
    return Curve(steps.astype(int), stacked.mean(0), half)


@dataclass(frozen=True)
class Split:
    """What a form of DINT gains over ``none`` at the end of the run, in nats per token, and what becomes of it; the
    half widths are those of 95 % intervals.

    Attributes:
        gain, gain_half_width: in the training loss (mean of the last tenth of the steps), or in the NLL of all held-out
            tokens, teacher-forced.
        leak, leak_half_width: of its final weights, at sampled positions of the same kind of rows.
        survives, survives_half_width: ``gain - leak``.
    """

    gain: float
    gain_half_width: float
    leak: float
    leak_half_width: float

    @property
    def survives(self) -> float:
        return self.gain - self.leak

    @property
    def survives_half_width(self) -> float:
        return math.hypot(self.gain_half_width, self.leak_half_width)


def split(results: Results, form: str, none: str, group: str) -> Split:
    """Split the gain of the run ``form`` over ``none``, over the seeds that both have.

    Args:
        group: ``training_rows`` or ``validation_metrics``.
    """
    seeds = sorted(set(results[form]) & set(results[none]))
    leak = curve([results[form][seed] for seed in seeds], f"{group}/leak")
    if group == "validation_metrics":
        found = difference(results, none, form, "held_out")
        gain, half = found.mean, found.high - found.mean
    else:
        gains = np.array([_last_losses(results[none][s]) - _last_losses(results[form][s]) for s in seeds])
        gain, half = float(gains.mean()), half_width_over_seeds(gains)
    return Split(gain, half, float(leak.mean[-1]), float(leak.half_width[-1]))


def _last_losses(record: dict[str, Any]) -> float:
    losses = [value for _, value in record["curves"]["loss_metrics/global_avg_loss"]]
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def _at(record: dict[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = record
    for key in path:
        value = value[key]
    return value
