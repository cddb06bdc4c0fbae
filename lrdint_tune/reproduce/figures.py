"""The figures of docs/results.md, from result files only."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from lrdint_tune.evaluation.statistics import Difference
from lrdint_tune.reproduce.results import Results, curve

COLOURS = {"none": "#555555", "dint": "#1f77b4", "literal": "#d62728"}
LABELS = {"none": "none (attention trained)", "dint": "DINT, causal", "literal": "DINT as printed"}
POINTS = 40  # of a training curve


def lengths(results: Results) -> list[int]:
    """The sequence lengths of the runs of recipes/reproduce/leak.py, named ``<variant>-n<length>``."""
    return sorted({int(run.rpartition("-n")[2]) for run in results})


def leak_figure(results: Results, file: Path, title: str, *, floor: float | None = None) -> None:
    """Training loss, held-out loss and the leak along the run, a column for each N.

    Args:
        results: of recipes/reproduce/leak.py with one preset.
        floor: entropy of the data in nats per token, where it is known.
    """
    found_lengths = lengths(results)
    size = (5 * len(found_lengths), 9.5)
    figure, axes = plt.subplots(3, len(found_lengths), figsize=size, sharex="col", squeeze=False)
    for column, n in enumerate(found_lengths):
        axes[2, column].sharey(axes[2, 0])
        records = {name: list(results.get(f"{name}-n{n}", {}).values()) for name in COLOURS}
        records = {name: found for name, found in records.items() if found}
        train, held_out, leak = axes[:, column]
        seeds = max(map(len, records.values()), default=0)
        train.set_title(f"N = {n}, {'one seed' if seeds == 1 else f'{seeds} seeds'}")
        for name, found in records.items():
            steps = len(found[0]["curves"]["loss_metrics/global_avg_loss"])
            style: dict[str, Any] = {"color": COLOURS[name], "label": LABELS[name]}
            _line(train, found, "loss_metrics/global_avg_loss", smooth=max(1, steps // POINTS), **style)
            _line(held_out, found, "validation_metrics/loss", **style)
            _line(leak, found, "validation_metrics/leak", **style)
        if "literal" in records:
            label = "DINT as printed, from prefixes alone"
            _prefix_wise(held_out, records["literal"], label=label, color=COLOURS["literal"])
            style = {"color": COLOURS["literal"], "linestyle": ":", "label": "DINT as printed, training rows"}
            _line(leak, records["literal"], "training_rows/leak", **style)
        _without_the_start(held_out)
        leak.axhline(0, color="black", linewidth=0.6)
        leak.set_xlabel("optimizer step")
        for axis in (train, held_out):
            if floor is not None:
                axis.axhline(floor, color="black", linewidth=0.8, linestyle="--", label=f"entropy {floor:.3f}")
    for axis, label in zip(
        axes[:, 0],
        (
            "training loss",
            "held-out NLL\n(teacher-forced unless said otherwise)",
            "leak: prefix-wise minus teacher-forced",
        ),
        strict=True,
    ):
        axis.set_ylabel(f"{label}\nnats per token" if "\n" not in label else label)
    for axis in axes[:, -1]:
        axis.legend(fontsize=8)
    figure.suptitle(title)
    _save(figure, file)


def _without_the_start(axis: Axes) -> None:
    """The first point is the untrained model's, the same for all and far above the others: not in the range."""
    points = np.concatenate([np.asarray(line.get_xydata(), np.float64) for line in axis.lines]).tolist()
    later = [y for x, y in points if x > 0]
    if later:
        margin = 0.1 * (max(later) - min(later)) + 1e-3
        axis.set_ylim(min(later) - margin, max(later) + margin)


def _prefix_wise(axis: Axes, records: list[dict[str, Any]], **style: Any) -> None:
    """The held-out loss from prefixes alone: the ordinary one plus the measured leak."""
    ordinary, leak = curve(records, "validation_metrics/loss"), curve(records, "validation_metrics/leak")
    axis.errorbar(
        ordinary.steps, ordinary.mean + leak.mean, leak.half_width, linestyle="--", linewidth=1.4, capsize=2, **style
    )


def _line(axis: Axes, records: list[dict[str, Any]], tag: str, *, smooth: int = 1, **style: Any) -> None:
    line = curve(records, tag, smooth=smooth)
    axis.plot(line.steps, line.mean, linewidth=1.4, **style)
    axis.fill_between(
        line.steps, line.mean - line.half_width, line.mean + line.half_width, alpha=0.18, color=style["color"]
    )


def difference_figure(rows: list[tuple[str, Difference, int]], file: Path, title: str, xlabel: str) -> None:
    """Paired differences with their 95 % intervals, one line per run; those beyond noise are filled, if they
    are of several seeds.

    Args:
        rows: name, difference and number of seeds, in the order from top to bottom.
    """
    figure, axis = plt.subplots(figsize=(7.5, 0.34 * len(rows) + 1.6))
    for place, (_, change, seeds) in enumerate(rows):
        beyond = change.is_beyond_noise and seeds > 1
        colour = "#555555" if not beyond else ("#2ca02c" if change.mean < 0 else "#d62728")
        axis.plot([change.low, change.high], [place, place], color=colour, linewidth=2)
        face = colour if beyond else "white"
        axis.plot([change.mean], [place], "o", color=colour, markerfacecolor=face)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [f"{name} ({seeds} seed{'s' * (seeds > 1)})" for name, _, seeds in rows])
    axis.invert_yaxis()
    _readable_limits(axis, [change for _, change, _ in rows])
    axis.set_xlabel(xlabel)
    axis.set_title(title, fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    _save(figure, file)


def _readable_limits(axis: Axes, changes: list[Difference]) -> None:
    """One run far outside must not squeeze the others to a point; it is drawn at the edge and the table has it."""
    ends = sorted(max(abs(change.low), abs(change.high)) for change in changes)
    usual = ends[int(0.75 * (len(ends) - 1))]
    if ends and ends[-1] > 6 * usual > 0:
        axis.set_xscale("symlog", linthresh=usual, linscale=3)


def grid_figure(
    grids: dict[str, list[list[float]]], rows: list[Any], columns: list[Any], file: Path, *, title: str, chance: float
) -> None:
    """Needle retrieval: accuracy by haystack length and depth, one panel per model.

    Args:
        grids: model -> ``[length][depth]``, NaN where nothing was measured.
        rows, columns: lengths in tokens, depths in percent.
        chance: of a guess; where the colour scale begins.
    """
    wide = min(4, len(grids))
    high = math.ceil(len(grids) / wide)
    size = (2.4 * wide + 0.9, 1.8 * high + 0.9)
    figure, axes = plt.subplots(high, wide, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set_visible(False)
    image = None
    for axis, (name, grid) in zip(axes.flat, grids.items(), strict=False):
        axis.set_visible(True)
        image = axis.imshow(grid, vmin=chance, vmax=1, cmap="viridis", aspect="auto")
        axis.set_title(name, fontsize=9)
        axis.set_xticks(range(len(columns)), columns, fontsize=7)
        axis.set_yticks(range(len(rows)), rows, fontsize=7)
        for i, line in enumerate(grid):
            for j, value in enumerate(line):
                colour = "white" if value < (1 + chance) / 2 else "black"  # viridis ends in yellow
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("depth of the needle, %", fontsize=9)
    figure.supylabel("haystack, tokens", fontsize=9)
    if image is not None:
        figure.colorbar(image, ax=axes, shrink=0.8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def layer_figure(lines: dict[str, list[float]], file: Path, title: str, ylabel: str) -> None:
    """One line per model over the layers; the first two (pretrained, control) are drawn bold."""
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for place, (name, values) in enumerate(lines.items()):
        # Ten colours, and then again with dots.
        style: dict[str, Any] = {
            "linewidth": 1.2,
            "color": f"C{(place - 2) % 10}",
            "linestyle": "-" if place < 12 else ":",
        }
        if place == 0:
            style = {"color": "black", "linewidth": 2.2}
        elif place == 1:
            style = {"color": "#555555", "linewidth": 2.2, "linestyle": "--"}
        axis.plot(range(len(values)), values, label=name, **style)
    axis.set_xlabel("layer")
    axis.set_ylabel(ylabel)
    axis.legend(fontsize=8, ncols=2)
    axis.set_title(title, fontsize=10)
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
