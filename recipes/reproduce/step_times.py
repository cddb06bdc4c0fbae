"""The time of a training step of every method beside the unmodified model's, in the same rounds of one process.

    python recipes/reproduce/step_times.py --preset smollm2_135m

Needs no data and no weights. Writes docs/results/step_times/<preset>.json.
"""

import argparse
import sys
from pathlib import Path

import torch
from methods import runs

from lrdint_tune.errors import ConfigError
from lrdint_tune.reproduce.gate import registered
from lrdint_tune.reproduce.runs import end_with, load_preset, one_process, preset_threads, versions, write_json
from lrdint_tune.reproduce.step_times import step_time_ratios
from lrdint_tune.training.world import resolve_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="smollm2_135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512, help="of a batch")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, help="of torch; the preset's, or torch's own choice")
    parser.add_argument("--results_dir", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    one_process()

    threads = options.threads or preset_threads(options.preset)
    if threads:
        torch.set_num_threads(threads)
    preset = load_preset(options.preset, "methods", Path("unused"))
    if options.tokens < preset.config["max_seq_len"]:
        n = preset.config["max_seq_len"]
        raise ConfigError(f"--tokens {options.tokens}: less than a sequence, max_seq_len={n}")
    with registered():
        ratios = step_time_ratios(
            preset,
            {run.name: run for run in runs(options.preset)},
            rounds=options.rounds,
            tokens=options.tokens,
            dtype=getattr(torch, options.dtype),
            device=resolve_device(preset.config["device"]),
        )
    file = options.results_dir / "step_times" / f"{options.preset}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        file,
        {
            "preset": options.preset,
            "ratios": ratios,
            "rounds": options.rounds,
            "tokens": options.tokens,
            "max_seq_len": preset.config["max_seq_len"],
            "dtype": options.dtype,
            "threads": torch.get_num_threads(),
            "command": " ".join([Path(sys.executable).name, *sys.argv]),
            "versions": versions(),
        },
    )
    for name, ratio in ratios.items():
        print(f"{name:24} {ratio['median']:.2f}  (FLOPs {ratio['flops']:.2f})")


if __name__ == "__main__":
    end_with(main)
