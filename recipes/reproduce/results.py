"""Figures and tables of docs/results.md, from the JSON files of the experiments alone.

    python recipes/reproduce/results.py

Writes docs/results/*.png, and the tables between the markers `<!-- name -->` and `<!-- end name -->` of
docs/results.md.
"""

import argparse
import json
import math
import re
from pathlib import Path

import numpy as np

from lrdint_tune.evaluation.statistics import Difference, paired_bootstrap
from lrdint_tune.reproduce.figures import difference_figure, grid_figure, layer_figure, leak_figure, lengths
from lrdint_tune.reproduce.results import (
    Results,
    difference,
    final_lambda,
    load_results,
    mean_over_seeds,
    split,
)

TITLES = {
    "stories260k": "stories260K on The Wizard of Oz",
    "letters": "Independent random letters",
    "smollm2_135m": "SmolLM2-135M on GSM8K",
    "llama3_2_1b": "Llama-3.2-1B on OpenMathInstruct-2",
}
# Runs of methods.py that differ from `dint` or `lmam` in one setting.
COMPARED = ("dint", "dint_gated", "diff", "lmam")
FLOORS = {"letters": math.log(8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results_dir", type=Path, default=Path("docs/results"))
    parser.add_argument("--document", type=Path, default=Path("docs/results.md"))
    options = parser.parse_args()
    tables = {}
    for folder in sorted((options.results_dir / "leak").glob("*")):
        preset, results = folder.name, load_results(folder)
        figure = options.results_dir / f"leak_{preset}.png"
        leak_figure(results, figure, TITLES.get(preset, preset), floor=FLOORS.get(preset))
        tables[f"leak {preset}"] = leak_table(results)
    for experiment, baseline in (("methods", "none"), ("ablations", "dint")):
        for folder in sorted((options.results_dir / experiment).glob("*")):
            preset, results = folder.name, load_results(folder)
            if experiment == "ablations":
                compared = load_results(options.results_dir / "methods" / preset)
                results |= {run: compared[run] for run in COMPARED if run in compared}
            if baseline not in results:
                print(f"{folder}: left out, {baseline} is not there yet (recipes/reproduce/methods.py)")
                continue
            results = {run: found for run, found in results.items() if base_of(run, baseline) in results}
            times = options.results_dir / "step_times" / f"{preset}.json"
            ratios = json.loads(times.read_text())["ratios"] if times.is_file() and experiment == "methods" else {}
            tables[f"{experiment} {preset}"] = comparison_table(results, baseline, ratios)
            rows = []
            for run in ordered(results):
                if (base := base_of(run, baseline)) != run:
                    seeds = len(set(results[run]) & set(results[base]))
                    rows.append((run, difference(results, run, base, "held_out"), seeds))
            difference_figure(
                rows,
                options.results_dir / f"{experiment}_{preset}.png",
                TITLES.get(preset, preset),
                f"held-out NLL minus that of {baseline}, nats per token (95 % interval)",
            )
    tables |= lam_lr_tables(options.results_dir)
    for folder in sorted((options.results_dir / "retrieval").glob("*")):
        records = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
        records = {name: records[name] for name in sorted(records, key=lambda n: (n != "base", n != "none", n))}
        tables[f"retrieval {folder.name}"] = retrieval_table(records)
        retrieval_figures(records, options.results_dir, folder.name)
    write_tables(options.document, tables)


def lam_lr_tables(results_dir: Path) -> dict[str, str]:
    """Runs of methods.py at other learning rates of λ (`lam_lr/<rate>`), beside those at the preset's."""
    tables = {}
    for preset in sorted({folder.name for folder in results_dir.glob("lam_lr/*/methods/*")}):
        others = {
            f"{run} lam_lr={folder.parts[-3]}": seeds
            for folder in results_dir.glob(f"lam_lr/*/methods/{preset}")
            for run, seeds in load_results(folder).items()
        }
        runs = {"none", *(run.split()[0] for run in others)}
        results = load_results(results_dir / "methods" / preset)
        if missing := sorted(runs - set(results)):
            print(f"lam_lr, {preset}: left out, {missing} are not there yet (recipes/reproduce/methods.py)")
            continue
        if alone := [run for run, seeds in others.items() if not set(seeds) & set(results["none"])]:
            print(f"lam_lr, {preset}: {alone} left out, no seed of theirs was run with method none")
        others = {run: seeds for run, seeds in others.items() if run not in alone}
        tables[f"lam_lr {preset}"] = comparison_table({run: results[run] for run in runs} | others, "none", {})
    return tables


def base_of(run: str, baseline: str) -> str:
    """LMAM's variants are compared with LMAM."""
    return "lmam" if baseline == "dint" and run.startswith("lmam") else baseline


def ordered(results: Results) -> list[str]:
    """In the order in which the experiment's script has them: that of their files' seconds would be chance."""
    return sorted(results, key=lambda run: (run.startswith("lmam"), run.startswith("control"), run))


def leak_table(results: Results) -> str:
    head = ["N", "rows", "seeds", "gain over `none`", "leak", "gain minus leak: from prefixes alone"]
    head += ["causal DINT's gain", "gain over causal DINT", "causal DINT: largest gap"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for n in lengths(results):
        literal, none, causal = runs = (f"literal-n{n}", f"none-n{n}", f"dint-n{n}")
        if not set(runs) <= set(results):
            continue
        seeds = set.intersection(*(set(results[run]) for run in runs))
        found = {run: {seed: results[run][seed] for seed in sorted(seeds)} for run in runs}
        for group, name in (("training_rows", "training"), ("validation_metrics", "held-out")):
            gaps = [abs(v) for r in found[causal].values() for _, v in r["curves"][f"{group}/leak"]]
            part, control, beyond = (
                split(found, run, base, group) for run, base in ((literal, none), (causal, none), (literal, causal))
            )
            cells = [str(n), name, str(len(seeds)), plus_minus(part.gain, part.gain_half_width)]
            cells += [plus_minus(part.leak, part.leak_half_width), plus_minus(part.survives, part.survives_half_width)]
            cells += [plus_minus(other.gain, other.gain_half_width) for other in (control, beyond)]
            lines.append(f"| {' | '.join([*cells, f'{max(gaps):.1e}'])} |")
    return "\n".join(lines)


def plus_minus(value: float, half_width: float) -> str:
    """Of one seed's training loss there is no interval."""
    return f"{round(value, 4) + 0.0:+.4f}" + (f" ± {half_width:.4f}" if half_width else "")


def comparison_table(results: Results, baseline: str, ratios: dict) -> str:
    others = sorted({name for seeds in results.values() for r in seeds.values() for name in r["forgetting"]})
    # A mean over more seeds could not be compared with the other rows.
    shared = sorted(set.intersection(*(set(seeds) for seeds in results.values())))
    head = [
        "run",
        "seeds",
        "trained (new)",
        f"held-out NLL, seed {', '.join(map(str, shared)) or 'none in common'}",
        f"minus `{baseline}` (95 %)",
    ]
    head += [f"{name}, minus `{baseline}` (95 %)" for name in others]
    head += ["final λ, mean (layers)"] + (["step time [quartiles] (FLOPs)"] if ratios else [])
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for run in ordered(results):
        record = next(iter(results[run].values()))
        base = base_of(run, baseline)
        cells = [f"`{run}`", str(len(results[run]))]
        cells.append(f"{record['trainable_parameters']:,} ({record['new_parameters']:,})")
        cells.append(held_out(results, run, shared))
        for path in (("held_out",), *(("forgetting", name) for name in others)):
            seeds = len(set(results[run]) & set(results[base]))
            cells.append("" if run == base else described(difference(results, run, base, *path), seeds > 1))
        lam = final_lambda(record)
        cells.append("" if lam is None else f"{lam[0]:+.3f} ({lam[1]:+.3f} to {lam[2]:+.3f})")
        if ratios:
            ratio = ratios.get(run)
            cells.append("" if ratio is None else step_time(ratio))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def held_out(results: Results, run: str, seeds: list[int]) -> str:
    if not seeds:
        return ""
    mean, spread = mean_over_seeds({run: {seed: results[run][seed] for seed in seeds}}, run, "held_out", "mean")
    return f"{mean:.4f}" + ("" if math.isnan(spread) else f" ± {spread:.4f}")


def step_time(ratio: dict) -> str:
    """Of a step_times.py record."""
    low, high = ratio["quartiles"]
    return f"{ratio['median']:.2f} [{low:.2f}, {high:.2f}] ({ratio['flops']:.2f})"


MAP_STATISTICS = {
    "entropy": "row entropy, nats",
    "first_token_mass": "first-token mass",
    "negative_share": "negative weights",
    "noise_to_signal": "noise to signal",
}


def retrieval_table(records: dict[str, dict]) -> str:
    """Needle retrieval, and the mean over layers and heads of what the probe says about the effective maps."""
    base = "none" if "none" in records else next(iter(records))
    head = ["model", "needle accuracy", f"minus `{base}` (95 %)", "exact", "NLL of the word", *MAP_STATISTICS.values()]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    compared = np.array(records[base]["needle"]["items"]["acc"]["values"])
    for name, record in records.items():
        metrics = record["needle"]["metrics"]
        change = paired_bootstrap(np.array(record["needle"]["items"]["acc"]["values"]), compared)
        cells = [f"`{name}`", f"{metrics['acc']['mean']:.3f} ± {metrics['acc']['stderr']:.3f}"]
        cells.append("" if name == base else described(change, can_decide=False))  # models of one seed
        cells += [f"{metrics['exact']['mean']:.3f}", f"{metrics['nll']['mean']:.3f}"]
        for statistic in MAP_STATISTICS:
            values = [layer["effective"][statistic] for layer in record["attention"]["layers"]]
            cells.append(f"{np.mean(values):.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def retrieval_figures(records: dict[str, dict], folder: Path, preset: str) -> None:
    details = {name: record["needle"] for name, record in records.items()}
    first = next(iter(details.values()))
    sizes = sorted({cell["length"] for cell in first["cells"]})
    depths = sorted({cell["depth"] for cell in first["cells"]})
    grids = {}
    for name, detail in details.items():
        found = {(cell["length"], cell["depth"]): cell["acc"]["mean"] for cell in detail["cells"]}
        grids[name] = [[found[length, depth] for depth in depths] for length in sizes]
    grid_figure(
        grids,
        sizes,
        [f"{100 * depth:.0f}" for depth in depths],
        folder / f"retrieval_{preset}.png",
        title=f"{TITLES.get(preset, preset)}: needle retrieval (chance {first['chance']:.2f})",
        chance=first["chance"],
    )
    entropies = {
        name: [float(np.mean(layer["effective"]["entropy"])) for layer in record["attention"]["layers"]]
        for name, record in records.items()
    }
    layer_figure(
        entropies,
        folder / f"entropy_{preset}.png",
        f"{TITLES.get(preset, preset)}: entropy of the rows of the effective maps",
        "nats, mean over heads",
    )


def described(change: Difference, can_decide: bool = True) -> str:
    """Bold where the interval leaves out 0, unless another seed might move it."""
    text = f"{change.mean:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"
    return f"**{text}**" if change.is_beyond_noise and can_decide else text


def write_tables(document: Path, tables: dict[str, str]) -> None:
    """Put each table between its markers; one without markers is printed, so that it is not lost."""
    text = document.read_text(encoding="utf-8") if document.is_file() else ""
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.DOTALL)
        if pattern.search(text):
            text = pattern.sub(lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", text)
        else:
            print(f"\n{name}\n\n{table}")
    if text:
        document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
