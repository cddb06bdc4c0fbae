"""What a model is worth: tasks, held-out losses, and paired differences to another model.

    tune run lrdint_tune/evaluate --config configs/evaluate.yaml model=output/run output_dir=output/evaluation
    python -m lrdint_tune.evaluate --config configs/evaluate.yaml model=some_hf_folder ...

One process. Writes ``output_dir/results.json`` after each task; tasks that it holds already are not measured again.
Exit codes: lrdint_tune/exit_codes.py.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lrdint_tune.entry import recipe
from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.loading import DTYPES, load_model
from lrdint_tune.evaluation.record import describe, kept_results
from lrdint_tune.evaluation.results import RESULTS_FILE, read_results, table, write_results
from lrdint_tune.evaluation.run import compare, measure_tasks
from lrdint_tune.evaluation.scoring import MAX_TOKENS
from lrdint_tune.evaluation.tasks import build_tasks
from lrdint_tune.exit_codes import DONE
from lrdint_tune.training.config import Section, check_choice, load_config
from lrdint_tune.training.world import resolve_device


@dataclass(frozen=True)
class EvaluateConfig:
    """The keys of configs/evaluate.yaml.

    Attributes:
        model: what :func:`~lrdint_tune.evaluation.loading.load_model` takes.
        output_dir: where ``results.json`` is written.
        tasks: what to measure, see docs/evaluation.md.
        base_model: the pretrained folder of an adapter or a checkpoint, if it is elsewhere now.
        tokenizer: a section as in training configs; null: the tokenizer in the model's folder.
        baseline: another model's ``results.json``.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``fp32`` or ``bf16``.
        max_seq_len: the most tokens given to the model at once; null: its limit.
        max_tokens: of a forward, padding included.
        seed: of what tasks draw, and of the bootstrap.
    """

    model: str
    output_dir: str
    tasks: list[Any]
    base_model: str | None = None
    tokenizer: Section | None = None
    baseline: str | None = None
    device: str = "auto"
    dtype: str = "fp32"
    max_seq_len: int | None = None
    max_tokens: int = MAX_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        check_choice("dtype", self.dtype, tuple(DTYPES))
        if not self.tasks:
            raise ConfigError("tasks=[]: nothing to measure; list some, see configs/evaluate.yaml")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens}: must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must not be negative")
        if self.tokenizer is not None and "_component_" not in self.tokenizer:
            raise ConfigError(f"tokenizer={self.tokenizer}: has no _component_; give the dotted path of what to build")


@recipe()
def recipe_main(cfg: DictConfig) -> int:
    """Evaluate the model that a config file with ``key=value`` overrides names; returns the exit code."""
    options = load_config(cfg, EvaluateConfig)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: the evaluation is one process; start it without torchrun"
        )
    tasks = build_tasks(options.tasks)
    baseline = None if options.baseline is None else read_results("baseline", Path(options.baseline))
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
