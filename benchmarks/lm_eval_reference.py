"""lm-eval's own numbers on local files, by its own Hugging Face wrapper: what ours are held against.

    pip install -e '.[lm-eval]'
    python -m benchmarks.lm_eval_reference --model model_folder --data_dir eval_files --output_dir output/lm_eval \\
        [--tasks lambada arc_easy] [--limit 100]

Writes ``<task>.json``: lm-eval's results with their standard errors, and each item's log-likelihoods. Nothing of
``lrdint_tune`` is imported; the prompts are lm-eval's for these tasks (``lambada_openai`` and ``arc_easy``), written
for the columns of the files.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

TASKS: dict[str, dict[str, Any]] = {
    "lambada": {
        "data_file": "lambada_openai.jsonl",
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation}}",
        "target_delimiter": "",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "arc_easy": {
        "data_file": "arc_easy.jsonl",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_target": "gold",
        "doc_to_choice": "{{choices}}",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
    },
}


def build_task(name: str, data_dir: Path) -> ConfigurableTask:
    config = dict(TASKS[name])
    file = data_dir / config.pop("data_file")
    return ConfigurableTask(
        config={
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}},
            "test_split": "test",
            **config,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--limit", type=int, help="only the first items")
    parser.add_argument("--batch_size", type=int, default=16)
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)

    model = HFLM(pretrained=options.model, dtype="float32", device="cpu", batch_size=options.batch_size)
    for name in options.tasks:
        start = time.time()
        task = build_task(name, options.data_dir)
        outcome = lm_eval.simple_evaluate(
            model=model, tasks=[task], limit=options.limit, log_samples=True, bootstrap_iters=1000
        )
        samples = [
            {"item": s["doc_id"], "loglikelihoods": [float(r[0]) for r in s["filtered_resps"]]}
            for s in outcome["samples"][name]
        ]
        record = {
            "lm_eval": lm_eval.__version__,
            "results": outcome["results"][name],
            "seconds": time.time() - start,
            "samples": sorted(samples, key=lambda s: s["item"]),
        }
        (options.output_dir / f"{name}.json").write_text(json.dumps(record) + "\n")
        print(name, outcome["results"][name])


if __name__ == "__main__":
    main()
