"""Figure and tables of docs/planted_noise.md, from the JSON files of planted_noise.py alone.

    python recipes/reproduce/planted_noise_results.py                                     # from docs/results
    python recipes/reproduce/planted_noise_results.py --output_dir output/planted_noise   # from new runs

New runs are put together into docs/results/planted_noise.jsonl, one line a run. Writes docs/planted_noise.png, and the
tables between the markers `<!-- name -->` and `<!-- end name -->` of docs/planted_noise.md. Intervals are 95 % over
seeds (Student's t).
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

from results import write_tables

from lrdint_tune.evaluation.statistics import Estimate, mean_estimate, student_t
from lrdint_tune.reproduce.planted_noise_figure import cell_order, noise_figure

Key = tuple[str, str, int, float]  # cell, kind, rank, strength


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, help="of new runs")
    parser.add_argument("--results", type=Path, default=Path("docs/results/planted_noise.jsonl"))
    parser.add_argument("--figure", type=Path, default=Path("docs/planted_noise.png"))
    parser.add_argument("--document", type=Path, default=Path("docs/planted_noise.md"))
    options = parser.parse_args()
    records: dict[Key, list[dict]] = defaultdict(list)
    if options.output_dir is not None:
        lines = [file.read_text().strip() + "\n" for file in sorted(options.output_dir.glob("*-seed*.json"))]
        options.results.write_text("".join(lines))
    for line in options.results.read_text().splitlines():
        record = json.loads(line)
        noise = record["noise"]
        records[record["name"], noise["kind"], noise["rank"], noise["strength"]].append(record)
    output = {key: removed(found, "output") for key, found in records.items()}
    noise_figure({key: value for key, value in output.items() if " " not in key[0]}, options.figure)
    maps = {key: removed(found, "map") for key, found in records.items()}
    tables = {"cells": cell_table(records, output, maps), "ceilings": ceiling_table(records)}
    tables["second maps"] = second_map_table(records, output, maps, ("bilinear", 4, 3.0))
    tables["second maps, even"] = second_map_table(records, output, maps, ("even", 4, 3.0))
    write_tables(options.document, tables)


def removed(found: list[dict], what: str) -> tuple[float, float]:
    """Share of the noise removed, in percent, and the half width of its interval."""
    return interval(mean_estimate([100 * (1 - record["left"][what]) for record in found]))


def interval(estimate: Estimate) -> tuple[float, float]:
    t = math.nan if estimate.n < 2 else student_t(estimate.n - 1)
    return estimate.mean, t * estimate.stderr


def text(value: tuple[float, float] | None) -> str:
    if value is None:
        return ""
    mean, half = value
    return f"{mean:.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")


def cell_table(records: dict[Key, list[dict]], output: dict, maps: dict) -> str:
    columns = [("bilinear", 1, 3.0), ("bilinear", 4, 3.0), ("bilinear", 16, 3.0)]
    columns += [("bilinear", 4, 1.0), ("even", 4, 3.0), ("even", 4, 1.0)]
    head = ["cell", "trained"] + [f"{kind}, r* {rank}, σ {strength:g}" for kind, rank, strength in columns]
    lines = [row(head + ["map: bilinear, r* 4, σ 3"]), "|" + "---|" * (len(head) + 1)]
    for name in dict.fromkeys(sorted((key[0] for key in records if " " not in key[0]), key=cell_order)):
        trained = next(found[0]["trained"] for key, found in records.items() if key[0] == name)
        cells = [text(output.get((name, *column))) for column in columns]
        lines.append(row([f"`{name}`", f"{trained:,}", *cells, text(maps.get((name, "bilinear", 4, 3.0)))]))
    return "\n".join(lines)


def ceiling_table(records: dict[Key, list[dict]]) -> str:
    found = {key[1:]: runs for key, runs in records.items() if key[0] == "attention"}
    columns = sorted(found)
    head = ["map"] + [f"{kind}, r* {rank}, σ {strength:g}" for kind, rank, strength in columns]
    lines = [row(head), "|" + "---|" * len(head)]
    for name in next(iter(found.values()))[0]["oracles"]:
        values = ([100 * (1 - run["oracles"][name]) for run in found[column]] for column in columns)
        lines.append(row([name, *(text(interval(mean_estimate(v))) for v in values)]))
    return "\n".join(lines)


def second_map_table(records: dict[Key, list[dict]], output: dict, maps: dict, noise: tuple[str, int, float]) -> str:
    """Methods with a second map on one noise: their variants, λ, and what the second map learned."""
    head = ["cell", "trained", "output", "map", "λ per head, seed by seed", "A2's logits with ξ", "with S_ideal"]
    lines = [row(head), "|" + "---|" * len(head)]
    for key in sorted(key for key in records if key[1:] == noise):
        found = records[key]
        if found[0]["resembles"] is None:
            continue
        lambdas = ["/".join(f"{v:+.2f}" for v in run["lambda"] or ()) for run in found]
        cells = [f"`{key[0]}`", f"{found[0]['trained']:,}", text(output[key]), text(maps[key])]
        cells.append(", ".join(filter(None, lambdas)))
        for what in ("noise", "ideal"):
            cells.append(f"{mean_estimate([run['resembles'][what] for run in found]).mean:+.2f}")
        lines.append(row(cells))
    return "\n".join(lines)


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
