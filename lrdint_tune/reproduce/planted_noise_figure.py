"""The figure of docs/planted_noise.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

PANELS = ("bilinear", 1.0), ("bilinear", 3.0), ("even", 1.0), ("even", 3.0)
TITLES = {"bilinear": "noise in $W_Q$, $W_K$", "even": "noise not in the weights"}
COLOURS = {1: "#9ecae1", 4: "#3182bd", 16: "#08306b"}


def noise_figure(removed: Mapping[tuple[str, str, int, float], tuple[float, float]], file: Path) -> None:
    """Share of the output noise removed: a row per cell, a panel per kind and strength of noise, a colour per rank.

    Args:
        removed: (cell, kind, rank, strength) -> percent and half width of its interval.
        file: PNG.
    """
    names = sorted({key[0] for key in removed}, key=cell_order)
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 0.27 * len(names) + 1.7), sharey=True)
    for axis, (kind, strength) in zip(axes, PANELS, strict=True):
        _panel(axis, {key: value for key, value in removed.items() if key[1] == kind and key[3] == strength}, names)
        axis.set_title(f"{TITLES[kind]}, σ = {strength:g}", fontsize=10)
        axis.set_xlabel("output noise removed, %", fontsize=9)
    axes[0].set_yticks(range(len(names)), names, fontsize=9)
    axes[0].invert_yaxis()
    handles = [plt.Line2D([], [], color=c, marker="o", linestyle="", label=f"r* = {r}") for r, c in COLOURS.items()]
    axes[0].legend(handles=handles, fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def cell_order(name: str) -> tuple[bool, int, str]:
    """Methods, LoRA by its rank, attention alone, methods with it."""
    return name.endswith("attention"), int(name.removeprefix("lora-")) if name.startswith("lora-") else 0, name


def _panel(axis: Axes, removed: Mapping[tuple[str, str, int, float], tuple[float, float]], names: list[str]) -> None:
    ranks = sorted({key[2] for key in removed})
    for (name, _, rank, _), (percent, half_width) in removed.items():
        y = names.index(name) + 0.22 * (ranks.index(rank) - (len(ranks) - 1) / 2)
        axis.errorbar(percent, y, xerr=half_width, fmt="o", markersize=4, linewidth=1, color=COLOURS[rank])
    axis.axvline(0, color="black", linewidth=0.8)
    axis.axvline(100, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlim(-25, 106)
    axis.grid(alpha=0.3)
