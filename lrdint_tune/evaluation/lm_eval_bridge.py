"""Our models under EleutherAI's lm-eval, by its Python API: its own tasks, its own code for prompts and metrics.

Needs the optional extra: ``pip install 'lrdint-tune[lm-eval]'``.
"""

from __future__ import annotations

import functools
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.measured import Measured, Values
from lrdint_tune.evaluation.scoring import Scorer

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

# Our names of tasks that have another one there.
NAMES = {"siqa": "social_iqa", "lambada": "lambada_openai"}
BOOTSTRAP = 1000  # resamples, for the standard errors that lm-eval takes from them
# Of lm-eval's metrics those that are a mean over items of the number that its log has for each.
_PER_ITEM = ("acc", "acc_norm", "exact_match")


def require_lm_eval() -> None:
    """Raise ConfigError, with the command that helps, where lm-eval is not installed."""
    try:
        import lm_eval.api.model  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"source='lm_eval': lm-eval cannot be imported ({error}); pip install 'lrdint-tune[lm-eval]', or give "
            "source: file"
        ) from None


def as_lm(scorer: Scorer) -> LM:
    """A model as lm-eval's harness takes it: everything that is answered by log-likelihoods.

    Raises:
        ConfigError: lm-eval is not installed; or, later, a task asks for generated text.
    """
    require_lm_eval()
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

    class ScorerLM(LM):
        def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
            scores = scorer.score([request.args for request in requests])
            return [(score.log_likelihood, score.is_greedy) for score in scores]

        def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
            totals = []
            for request in requests:
                windows = scorer.rolling_windows(scorer.encode(request.args[0]))
                totals.append(sum(score.log_likelihood for score in scorer.score_tokens(windows)))
            return totals

        def generate_until(self, requests: list[Instance]) -> list[str]:
            raise ConfigError("source='lm_eval': this task generates text, which is not there; choose another one")

    return ScorerLM()


def measure_with_lm_eval(scorer: Scorer, task: str, file: str | None, limit: int | None, seed: int) -> Measured:
    """One of lm-eval's registered tasks, as its harness runs it.

    Args:
        task: our name of it, or lm-eval's.
        file: a JSONL file with the columns of the task's data set on the hub, instead of that; None: the hub.
        limit: only the first so many items.
        seed: of all of lm-eval's draws.

    Returns:
        What lm-eval reports, under its metrics' names, with its standard errors; per item where its log has numbers.

    Raises:
        ConfigError: lm-eval is not installed or does not know the task, or the data cannot be had or read.
    """
    require_lm_eval()
    import lm_eval

    name = NAMES.get(task, task)
    manager = _all_tasks()
    if name not in manager.all_subtasks:
        raise ConfigError(f"task={task!r}: lm-eval {lm_eval.__version__} has no task {name!r}; check the name")
    seeds = {f"{kind}_seed": seed for kind in ("random", "numpy_random", "torch_random", "fewshot_random")}
    options = {"task_manager": manager, "limit": limit, "log_samples": True, "bootstrap_iters": BOOTSTRAP, **seeds}
    try:
        with tempfile.TemporaryDirectory() as folder:
            chosen = name
            if file is not None:
                chosen = _write_task(Path(folder), name, str(manager.task_index[name].yaml_path), file)
            outcome = lm_eval.simple_evaluate(model=as_lm(scorer), tasks=[chosen], **options)
    except (OSError, ValueError, KeyError, ImportError) as error:  # the hub's errors are OSErrors
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        where = "from the hub" if file is None else f"from file={file!r}"
        raise ConfigError(f"task={task!r}: cannot be measured with data {where} ({reason}); check them") from error
    samples = sorted(outcome["samples"][name], key=lambda sample: sample["doc_id"])
    items = {
        metric: Values([float(sample[metric]) for sample in samples])
        for metric in _PER_ITEM
        if all(metric in sample for sample in samples)
    }
    reported = {key: value for key, value in outcome["results"][name].items() if isinstance(value, (int, float))}
    return Measured(items, details={"lm_eval": reported, "lm_eval_version": version("lm_eval")})


@functools.cache
def _all_tasks() -> TaskManager:
    """lm-eval's list of its tasks, which takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _write_task(folder: Path, name: str, included: str, file: str) -> str:
    """The path of a YAML file with lm-eval's own task on other data, which stand for whatever split it evaluates."""
    task = {
        "include": included,
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(Path(file).resolve())}},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task), encoding="utf-8")
    return str(path)
