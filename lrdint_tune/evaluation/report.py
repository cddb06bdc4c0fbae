"""A run's attention before and after training as one HTML file, which needs no other file and no network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf

from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.attention_record import RUN_FILE, read_record, step_files
from lrdint_tune.evaluation.heat_map import data_uri, pixels, unpack
from lrdint_tune.evaluation.report_style import STYLE
from lrdint_tune.evaluation.svg import Point, Series, chart
from lrdint_tune.export.atomic import atomic_text

Record = dict[str, Any]

# Statistic -> title of its chart and what the number is.
TITLES = {
    "entropy": ("Entropy of a row", "nats"),
    "first_token_mass": ("Share on the document's first token", "share of |w|"),
    "negative_share": ("Share of negative weights (Neg Rat)", "share of weights"),
    "noise_to_signal": ("Noise to signal: outside over inside the {top_k} largest", "ratio of |w|"),
    "future_mass": ("Share on later tokens: the leak", "share of |w|"),
}
CURVES = {
    "loss_metrics/global_avg_loss": ("training", "third"),
    "validation_metrics/loss": ("held out, teacher-forced", "after"),
    "validation_metrics/teacher_forced_loss": ("held out, some positions, teacher-forced", "fourth"),
    "validation_metrics/prefix_wise_loss": ("the same, prefix-wise", "before"),
}


@dataclass(frozen=True)
class Report:
    """What the page shows.

    Attributes:
        title: of the page.
        before, after: two records of :func:`~lrdint_tune.evaluation.attention_record.as_record`.
        names: of the two.
        curves: tag -> points of a loss curve; may be empty.
        config: of the run, None if it is not known.
    """

    title: str
    before: Record
    after: Record
    names: tuple[str, str]
    curves: Mapping[str, list[Point]] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


def report_of_run(run: Path) -> Report:
    """First and last record of a run's ``attention`` folder, its loss curves and its config.

    Raises:
        ConfigError: there are no two records.
    """
    files = step_files(run / "attention")
    if len(files) < 2:
        raise ConfigError(
            f"run={str(run)!r}: {len(files)} of the two records that a report compares; train with an attention_probe "
            "section, or give before and after"
        )
    (first, before), *_, (last, after) = files.items()
    facts = _facts(run / "attention" / RUN_FILE)
    names = (f"step {first}", f"step {last}")
    curves = _curves(run / "attention" / facts["metrics"]) if "metrics" in facts else {}
    title = f"Attention of {run.absolute().name}"
    return Report(title, read_record(before), read_record(after), names, curves, facts.get("config"))


def _facts(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


def _curves(file: Path) -> dict[str, list[Point]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return {tag: [(line["step"], line[tag]) for line in lines if tag in line] for tag in CURVES}


def write_report(report: Report, file: Path) -> None:
    """Write the page.

    Raises:
        ConfigError: the two records are not of models of one shape.
    """
    before, after = report.before["layers"], report.after["layers"]
    shapes = [(len(layers), len(layers[0]["effective"]["entropy"])) for layers in (before, after)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"before, after: {shapes[0]} and {shapes[1]} layers and heads; compare models of one architecture"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_text(file, _page(report))


def _page(report: Report) -> str:
    body = "\n".join(_sections(report))
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(report.title)}</title><style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def _sections(report: Report) -> Iterator[str]:
    after = report.after
    yield f"<h1>{escape(report.title)}</h1>"
    yield (
        f"<p>Method <b>{escape(after['method'])}</b>, {len(after['layers'])} layers. "
        f"<span class='before'>&#9632; {escape(report.names[0])}</span> against "
        f"<span class='after'>&#9632; {escape(report.names[1])}</span>, on one text of {after['num_tokens']} tokens. "
        "The map shown is the effective one, M of out = M v; for dex and diffv, which act on features and values, it "
        "is the softmax map. A dot is a head, the line is the mean over heads. Where weights w may be negative, shares "
        "and entropy are of |w|.</p>"
    )
    if any(report.curves.values()):
        lines = [Series(name, report.curves.get(tag, []), style) for tag, (name, style) in CURVES.items()]
        yield "<h2>Loss</h2>" + _row(chart("Nats per token", lines, x_label="step", y_label="nats"))
    yield "<h2>Attention per layer</h2>" + _row(*_statistics(report))
    lam = _row(*_second_map(report))
    yield f"<h2>λ and the second map</h2>{lam}" if lam else ""
    yield from _heat_maps(report)
    yield _entropy_table(report)
    if report.config is not None:
        text = OmegaConf.to_yaml(OmegaConf.create(dict(report.config)))
        yield f"<details><summary>Config</summary><pre>{escape(text)}</pre></details>"


def _row(*charts: str) -> str:
    return f"<div class='row'>{''.join(charts)}</div>" if charts else ""


def _sides(report: Report) -> list[tuple[str, str, list[Any]]]:
    """Name, CSS class and layers of before and after."""
    return [
        (report.names[0], "before", report.before["layers"]),
        (report.names[1], "after", report.after["layers"]),
    ]


def _statistics(report: Report) -> Iterator[str]:
    for statistic, (title, unit) in TITLES.items():
        sides = [
            (name, style, [layer["effective"][statistic] for layer in layers]) for name, style, layers in _sides(report)
        ]
        values = [value for _, _, layers in sides for heads in layers for value in heads]
        if statistic in ("negative_share", "future_mass") and all(abs(value) < 1e-6 for value in values):
            continue  # softmax maps have neither
        title = title.format(top_k=report.after["top_k"])
        yield _per_layer(title, sides, unit)


def _second_map(report: Report) -> Iterator[str]:
    lam = [
        (name, style, [layer["lambda"]["per_head"] if layer["lambda"] else [] for layer in layers])
        for name, style, layers in _sides(report)
    ]
    if any(heads for _, _, layers in lam for heads in layers):
        yield _per_layer("λ", lam, "λ")
    ratio = [
        (name, style, [[] if layer["o2_o1_ratio"] is None else [layer["o2_o1_ratio"]] for layer in layers])
        for name, style, layers in _sides(report)
    ]
    if any(heads for _, _, layers in ratio for heads in layers):
        yield _per_layer("‖O2‖/‖O1‖: the second term's size, before λ", ratio, "ratio of norms")


def _per_layer(title: str, sides: list[tuple[str, str, list[list[float]]]], unit: str) -> str:
    """Dots for heads, a line for their mean."""
    series = []
    for name, style, layers in sides:
        dots = [(i, value) for i, heads in enumerate(layers) if len(heads) > 1 for value in heads]
        series.append(Series(f"{name}, a head", dots, style, line=False))
    for name, style, layers in sides:
        series.append(Series(name, [(i, fmean(heads)) for i, heads in enumerate(layers) if heads], style))
    return chart(title, series, x_label="layer", y_label=unit)


def _heat_maps(report: Report) -> Iterator[str]:
    before, after = report.before["heat_maps"], report.after["heat_maps"]
    names = [name for name in after if name in before]
    if not names:
        return
    yield (
        "<h2>Heat maps</h2><p>Rows are queries from top to bottom, columns keys from left to right; a cell is the mean "
        "over some tokens. <span class='above'>&#9632; above 0</span>, <span class='below'>&#9632; below 0</span>; the "
        "colour goes with the root of the weight, on one scale for both maps of a head.</p>"
    )
    figures = []
    for name in names:
        maps = [unpack(before[name]), unpack(after[name])]
        limit = max(float(abs(m).max()) for m in maps)
        layer, head = (part.split(".")[1] for part in name.split("/"))
        pictures = "".join(
            f"<div><img alt='{escape(label, quote=True)}' src='{data_uri(pixels(m, limit, side=len(m)))}'>"
            f"<small>{escape(label)}</small></div>"
            for m, label in zip(maps, report.names, strict=True)
        )
        figures.append(
            f"<figure class='maps'><figcaption>layer {layer}, head {head}, up to {limit:.2g}</figcaption>"
            f"<div>{pictures}</div></figure>"
        )
    yield _row(*figures)


def _entropy_table(report: Report) -> str:
    """Before and after, layers down and heads across."""
    layers = [
        [(b, a) for b, a in zip(before["effective"]["entropy"], after["effective"]["entropy"], strict=True)]
        for before, after in zip(report.before["layers"], report.after["layers"], strict=True)
    ]
    head = "".join(f"<th>{i}</th>" for i in range(len(layers[0])))
    rows = "".join(
        f"<tr><th>{i}</th>" + "".join(f"<td>{b:.2f} &rarr; {a:.2f}</td>" for b, a in heads) + "</tr>"
        for i, heads in enumerate(layers)
    )
    return (
        "<details><summary>Entropy of every head, in nats</summary><div class='scroll'>"
        f"<table><tr><th>layer \\ head</th>{head}</tr>{rows}</table></div></details>"
    )
