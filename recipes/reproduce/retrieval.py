"""Needle retrieval and attention maps of the pretrained model and of every method trained by `methods.py`.

    python recipes/reproduce/methods.py --preset smollm2_135m --data_dir DATA      # first: trains and keeps the models
    python recipes/reproduce/retrieval.py --preset smollm2_135m

Seed 002's Fig. 1 and Table 2 (NR), seed 004's Fig. 1 and 3. The needles are this project's (docs/evaluation.md): the
seed does not describe its own. Finished models are not measured again.
"""

import argparse
import sys
from pathlib import Path

import torch
from methods import GATED, METHODS

from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.attention_maps import attention_statistics
from lrdint_tune.evaluation.loading import load_model
from lrdint_tune.evaluation.probe_text import probe_tokens
from lrdint_tune.evaluation.run import evaluate_model
from lrdint_tune.reproduce.runs import (
    end_with,
    load_preset,
    one_process,
    preset_threads,
    read_json,
    refuse_others,
    versions,
    write_json,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="smollm2_135m")
    parser.add_argument("--work_dir", type=Path, default=Path("output/reproduce"))
    parser.add_argument("--results_dir", type=Path, default=Path("docs/results"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--depths", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--needles", type=int, default=4, help="facts in the haystack: one alone is found every time")
    parser.add_argument("--samples", type=int, default=6, help="per length and depth")
    parser.add_argument("--tokens", type=int, default=256, help="of the probe text, for the attention maps")
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16"])
    options = parser.parse_args()
    one_process()

    threads = preset_threads(options.preset)
    if threads:
        torch.set_num_threads(threads)
    work = (options.work_dir / options.preset).absolute()
    preset = load_preset(options.preset, "methods", work)
    folders = {"base": Path(preset.config["checkpointer"]["checkpoint_dir"])}
    folders |= {name: work / "methods" / f"{name}-seed0" / "hf" for name in (*METHODS, *(f"{m}_gated" for m in GATED))}
    device = torch.device("cpu" if preset.config["device"] == "cpu" else "cuda")
    needle = {"task": "needle", "lengths": options.lengths, "depths": options.depths, "samples": options.samples}
    needle |= {"needles": options.needles, "candidates": max(4, options.needles)}

    for name, folder in folders.items():
        file = options.results_dir / "retrieval" / options.preset / f"{name}.json"
        if file.is_file():
            there = read_json(file)
            had = {**there["needle"]["settings"], "dtype": there["dtype"], "tokens": there["attention"]["num_tokens"]}
            refuse_others(file, had, {**needle, "dtype": options.dtype, "tokens": options.tokens})
            print(f"{file}: already there")
            continue
        if not folder.is_dir():
            raise ConfigError(
                f"{folder}: no such model; run recipes/reproduce/methods.py --preset {options.preset} first"
            )
        loaded = load_model(str(folder), dtype=options.dtype, device=device, tokenizer=preset.config["tokenizer"])
        outcome = evaluate_model(loaded.model, loaded.tokenizer, [needle], device=device)["needle"]
        tokens = probe_tokens(loaded.tokenizer, max_tokens=options.tokens).to(device)
        maps = attention_statistics(loaded.model, tokens)
        file.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "model": name,
            "preset": options.preset,
            "needle": outcome,
            "attention": maps,
            "dtype": options.dtype,
            "command": " ".join([Path(sys.executable).name, *sys.argv]),
            "versions": versions(),
        }
        write_json(file, record)
        print(f"{file}: accuracy {outcome['metrics']['acc']['mean']:.3f}")


if __name__ == "__main__":
    end_with(main)
