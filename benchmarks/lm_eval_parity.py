"""Our evaluation's numbers beside lm-eval's own on the same items.

tune run lrdint_tune/evaluate --config benchmarks/lm_eval_parity.yaml model=MODEL output_dir=output/parity
python -m benchmarks.lm_eval_reference --model MODEL --data_dir eval --output_dir output/lm_eval
python -m benchmarks.lm_eval_parity --ours output/parity/results.json --reference output/lm_eval
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

# Of the tasks in the results; others were not run beside lm-eval.
METRICS = {"arc_easy": ("acc", "acc_norm"), "lambada": ("acc", "perplexity")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", type=Path, required=True, help="results.json of lrdint_tune/evaluate")
    parser.add_argument("--reference", type=Path, required=True, help="folder of benchmarks.lm_eval_reference")
    options = parser.parse_args()
    tasks = json.loads(options.ours.read_text())["tasks"]
    print("| | ours | lm-eval | items | largest difference of a log-likelihood |\n|---|---|---|---|---|")
    for name in tasks:
        metrics = METRICS[name]
        reference = json.loads((options.reference / f"{name}.json").read_text())
        samples = [sample["loglikelihoods"] for sample in reference["samples"]]
        largest = max(map(abs, _differences(tasks[name], samples)))
        for metric in metrics:
            ours, theirs = tasks[name]["metrics"][metric], reference["results"]
            print(
                f"| {name} `{metric}` | {ours['mean']:.6f} ± {ours['stderr']:.6f} | {theirs[f'{metric},none']:.6f} ± "
                f"{theirs[f'{metric}_stderr,none']:.6f} | {len(samples)} | {largest:.1e} |"
            )


def _differences(task: dict[str, Any], samples: list[list[float]]) -> list[float]:
    """Ours minus theirs for every continuation whose log-likelihood our results keep."""
    ours = task.get("log_likelihoods") or [[-value] for value in task["items"]["nll"]["values"]]
    assert [len(item) for item in ours] == [len(item) for item in samples], "other items"
    return [a - b for item, sample in zip(ours, samples, strict=True) for a, b in zip(item, sample, strict=True)]


if __name__ == "__main__":
    main()
