"""How much planted attention noise does each method remove? (seed 002 section 3.4; docs/planted_noise.md)

    python recipes/reproduce/planted_noise.py --output_dir output/planted_noise --seeds 0 1 2
    python recipes/reproduce/planted_noise_results.py --output_dir output/planted_noise

Needs no model and no data. Writes one JSON file per run into the output folder; finished runs are not repeated.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from lrdint_tune.errors import ConfigError
from lrdint_tune.reproduce.planted_noise import Noise
from lrdint_tune.reproduce.planted_noise_runs import ABLATIONS, Cell, Schedule, default_cells, run_cell
from lrdint_tune.reproduce.runs import end_with, one_process, read_json, refuse_others, versions, write_json

RANKS, STRENGTHS = (1, 4, 16), (1.0, 3.0)
STRONG, STRONG_EVEN = Noise("bilinear", 4, 3.0), Noise("even", 4, 3.0)


def runs() -> Iterator[tuple[str, Cell, Noise]]:
    """Every cell on noise that the weights hold; without ranks on noise that they do not; the rest on one of each."""
    cells = default_cells()
    planted = [Noise("bilinear", rank, strength) for rank in RANKS for strength in STRENGTHS]
    planted += [Noise("even", STRONG_EVEN.rank, strength) for strength in STRENGTHS]
    for noise in planted:
        for name, cell in cells.items():
            if not name.endswith("+attention") or noise in (STRONG, STRONG_EVEN):
                yield name, cell, noise
    for name, cell in ABLATIONS.items():
        yield name, cell, STRONG


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("output/planted_noise"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Schedule.steps)
    parser.add_argument("--lr", type=float, default=Schedule.lr)
    parser.add_argument("--only", nargs="+", help="names of cells, such as dint, attention, 'dint rank-1'")
    options = parser.parse_args()
    one_process()
    torch.set_num_threads(1)  # the layer is small
    schedule = Schedule(steps=options.steps, lr=options.lr)
    chosen = [run for run in runs() if not options.only or run[0] in options.only]
    unknown = set(options.only or []) - {name for name, _, _ in runs()}
    if unknown:
        known = ", ".join(dict.fromkeys(name for name, _, _ in runs()))
        raise ConfigError(f"--only {' '.join(sorted(unknown))}: no such cell; there are {known}")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    common = {"command": " ".join([Path(sys.executable).name, *sys.argv]), "versions": versions()}
    todo = [(seed, *run) for seed in options.seeds for run in chosen]
    for seed, name, cell, noise in tqdm(todo, unit="run"):
        place = f"{name.replace(' ', '-')}-{noise.kind}-r{noise.rank}-s{noise.strength:g}-seed{seed}.json"
        file = options.output_dir / place
        if file.is_file():
            refuse_others(file, read_json(file)["schedule"], asdict(schedule))
            continue
        start = time.process_time()
        record = {"name": name, **run_cell(cell, noise, seed, schedule), **common}
        write_json(file, {**record, "cpu_seconds": time.process_time() - start})


if __name__ == "__main__":
    end_with(main)
