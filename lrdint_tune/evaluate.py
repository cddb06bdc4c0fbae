"""What a model is worth: tasks, held-out losses, and paired differences to another model.

    tune run lrdint_tune/evaluate --config configs/evaluate.yaml model=output/run output_dir=output/evaluation
    python -m lrdint_tune.evaluate --config configs/evaluate.yaml model=some_hf_folder ...

One process. Writes ``output_dir/results.json`` after each task; tasks that it holds already are not measured again.
Exit codes: lrdint_tune/exit_codes.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lrdint_tune.entry import recipe
from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.config import EvaluateConfig
from lrdint_tune.evaluation.loading import load_model
from lrdint_tune.evaluation.record import describe, kept_results, read_baseline
from lrdint_tune.evaluation.results import RESULTS_FILE, table, write_results
from lrdint_tune.evaluation.run import compare, measure_tasks
from lrdint_tune.evaluation.tasks import build_tasks
from lrdint_tune.exit_codes import DONE
from lrdint_tune.training.config import load_config
from lrdint_tune.training.world import resolve_device


@recipe()
def recipe_main(cfg: DictConfig) -> int:
    """Evaluate the model that a config file with ``key=value`` overrides names; returns the exit code."""
    options = load_config(cfg, EvaluateConfig)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: the evaluation is one process; start it without torchrun"
        )
    tasks = build_tasks(options.tasks)
    baseline = (
        None
        if options.baseline is None
        else read_baseline(Path(options.baseline), seed=options.seed, max_seq_len=options.max_seq_len)
    )
    device = resolve_device(options.device)
    loaded = load_model(
        options.model, base_model=options.base_model, tokenizer=options.tokenizer, device=device, dtype=options.dtype
    )
    header = describe(loaded, dtype=options.dtype, device=device, seed=options.seed, max_seq_len=options.max_seq_len)
    file = Path(options.output_dir) / RESULTS_FILE
    kept = kept_results(file, header, tasks)
    results = dict(kept)

    def save(name: str, result: dict[str, Any]) -> None:
        results[name] = result
        write_results(file, {**header, "tasks": results})

    measure_tasks(
        loaded.model,
        loaded.tokenizer,
        {name: task for name, task in tasks.items() if name not in kept},
        device=device,
        seed=options.seed,
        max_seq_len=options.max_seq_len,
        max_tokens=options.max_tokens,
        after_each=save,
    )
    asked = {name: results[name] for name in tasks}
    differences = {} if baseline is None else compare(asked, baseline["tasks"], seed=options.seed)
    against = {
        name: {metric: difference.as_dict() for metric, difference in metrics.items()}
        for name, metrics in differences.items()
    }
    comparison = {} if baseline is None else {"baseline": {"file": options.baseline, "differences": against}}
    write_results(file, {**header, **comparison, "tasks": results})
    print(table(asked, differences))
    return DONE


if __name__ == "__main__":
    sys.exit(recipe_main())
