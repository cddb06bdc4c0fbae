"""All tasks of a list on one model, and the differences to another model's results."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.scoring import MAX_TOKENS, Scorer
from lrdint_tune.evaluation.statistics import Difference, paired_bootstrap
from lrdint_tune.evaluation.tasks import Task, build_tasks, settings
from lrdint_tune.models.decoder import LlamaDecoder

log = logging.getLogger(__name__)

# Options of a task's dataset that its items do not depend on.
_NO_EFFECT = ("dataset.cache_dir", "dataset.num_proc", "dataset.packed")


def evaluate_model(
    model: LlamaDecoder,
    tokenizer: Any,
    tasks: Sequence[Mapping[str, Any]],
    *,
    device: torch.device | str,
    seed: int = 0,
    max_seq_len: int | None = None,
    max_tokens: int = MAX_TOKENS,
) -> dict[str, Any]:
    """Measure a model.

    Args:
        model: on ``device``; evaluated without dropout, its mode is restored.
        tokenizer: a torchtune tokenizer.
        tasks: entries as in ``tasks`` of configs/evaluate.yaml.
        seed: of whatever a task draws.
        max_seq_len: the most tokens given to the model at once; None: its limit.
        max_tokens: of a forward, padding included.

    Returns:
        Result name -> ``settings``, ``seconds``, ``metrics`` (name -> mean, stderr, n) and ``items`` (metric -> values
        of each item, and counts), as JSON values.

    Raises:
        ConfigError: a wrong entry, or data that does not fit it.
    """
    built = build_tasks([dict(entry) for entry in tasks])
    return measure_tasks(
        model, tokenizer, built, device=torch.device(device), seed=seed, max_seq_len=max_seq_len, max_tokens=max_tokens
    )


def measure_tasks(
    model: LlamaDecoder,
    tokenizer: Any,
    tasks: Mapping[str, Task],
    *,
    device: torch.device,
    seed: int,
    max_seq_len: int | None,
    max_tokens: int,
    after_each: Callable[[str, dict[str, Any]], None] = lambda name, result: None,
) -> dict[str, Any]:
    """:func:`evaluate_model` for tasks already built; ``after_each`` gets each result as it comes."""
    results = {}
    training = model.training
    model.eval()
    try:
        for name, task in tasks.items():
            start = time.monotonic()
            with tqdm(desc=name, unit="seq", leave=False) as bar:
                scorer = Scorer(
                    model,
                    tokenizer,
                    device=device,
                    max_seq_len=max_seq_len,
                    max_tokens=max_tokens,
                    progress=bar.update,
                )
                try:
                    measured = task.measure(scorer, seed)
                except ConfigError as error:
                    raise ConfigError(f"tasks, {name}: {error}") from None
            seconds = time.monotonic() - start
            results[name] = {"settings": settings(task), "seconds": seconds, **measured.as_dict()}
            after_each(name, results[name])
    finally:
        model.train(training)
    return results


def is_same_task(result: Mapping[str, Any], task: Task) -> bool:
    """Whether ``result`` is one of this task's on the same items."""
    return _items_of(result["settings"]) == _items_of(settings(task))


def compare(ours: Mapping[str, Any], baseline: Mapping[str, Any], *, seed: int = 0) -> dict[str, dict[str, Difference]]:
    """Paired differences, ours minus the baseline's, of every metric that both have item by item.

    Args:
        ours, baseline: what :func:`evaluate_model` returned. Tasks that only one of them has are left out, by name in
            the log.
        seed: of the bootstrap.

    Raises:
        ConfigError: a task of both was measured on different items.
    """
    differences: dict[str, dict[str, Difference]] = {}
    for name, result in ours.items():
        other = baseline.get(name)
        if other is None:
            log.info("%s: not in the baseline's results", name)
            continue
        mine, theirs = _items_of(result["settings"]), _items_of(other["settings"])
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                raise ConfigError(
                    f"baseline: {name} has {key}={theirs.get(key)!r} there and {mine.get(key)!r} here; measure both "
                    "on the same items"
                )
        differences[name] = {}
        for metric, values in result["items"].items():
            there = other["items"][metric]  # the same settings have the same metrics
            if values["counts"] != there["counts"] or len(values["values"]) != len(there["values"]):
                raise ConfigError(
                    f"baseline: {name} has other items or other tokens there; measure both on the same data, with the "
                    "same tokenizer"
                )
            differences[name][metric] = paired_bootstrap(values["values"], there["values"], values["counts"], seed=seed)
    return differences


def _items_of(task_settings: Mapping[str, Any]) -> dict[str, Any]:
    """By dotted names, without those that say nothing: a place whose files have a digest may be another."""
    dropped = {*_NO_EFFECT, *task_settings.get("digests", ())}
    flat: dict[str, Any] = {}
    for key, value in task_settings.items():
        if key == "dataset":
            flat |= {f"{key}.{option}": part for option, part in value.items()}
        else:
            flat[key] = value
    return {key: value for key, value in flat.items() if key not in dropped}
