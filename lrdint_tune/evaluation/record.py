"""What stands above the results of an evaluation, and which of the results of an earlier call still hold."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lrdint_tune import __version__
from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.loading import Loaded
from lrdint_tune.evaluation.results import read_results
from lrdint_tune.evaluation.run import is_same_task
from lrdint_tune.evaluation.tasks import Task
from lrdint_tune.models.hf_config import full_options

log = logging.getLogger(__name__)

# What all numbers of a results file depend on, beside each task's own settings.
_DECISIVE = ("weights", "tokenizer", "lrdint_tune", "dtype", "device", "seed", "max_seq_len")


def describe(loaded: Loaded, *, dtype: str, device: torch.device, seed: int, max_seq_len: int | None) -> dict[str, Any]:
    """The head of a results file: the model, how it was run, the versions and the command."""
    spec = loaded.model.spec
    return {
        "model": str(loaded.folder),
        "base_model": None if loaded.base is None else str(loaded.base),
        "weights": loaded.weights,
        "tokenizer": loaded.tokenizer_digest,
        "lrdint_tune": __version__,
        "method": spec.method,
        "method_options": full_options(spec),
        "adapters": spec.adapters,
        "leaks_future": spec.leaks_future,
        "dtype": dtype,
        "device": device.type,
        "seed": seed,
        "max_seq_len": max_seq_len,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__}
        | {name: version(name) for name in ("torchtune", "transformers", "tokenizers")},
        "command": sys.argv,
    }


def kept_results(file: Path, header: Mapping[str, Any], tasks: Mapping[str, Task]) -> dict[str, Any]:
    """The results in ``file`` that were measured as ``header`` and ``tasks`` say: nothing to do for these.

    Results of tasks that are not asked for now are kept too; one of the same name with other settings is dropped.

    Raises:
        ConfigError: the file holds those of another model, or of one that was run otherwise.
    """
    if not file.exists():
        return {}
    found = read_results("output_dir", file)
    for key in _DECISIVE:
        if found.get(key) != header[key]:
            raise ConfigError(
                f"output_dir={str(file.parent)!r}: holds results of {found.get('model')} with "
                f"{key}={found.get(key)!r}, this is {header['model']} with {header[key]!r}; choose another output_dir"
            )
    kept = {}
    for name, result in found["tasks"].items():
        if name in tasks and not is_same_task(result, tasks[name]):
            log.info("%s: settings have changed, it is measured again", name)
            continue
        if name in tasks:
            log.info("%s: measured already", name)
        kept[name] = result
    return kept


def read_baseline(file: Path, **drawn: int | None) -> dict[str, Any]:
    """The results file to compare with.

    Args:
        drawn: ``seed`` and ``max_seq_len`` of this evaluation, which decide what is drawn and cut from the data.

    Raises:
        ConfigError: it cannot be read, or has others: its items would be paired with different ones.
    """
    found = read_results("baseline", file)
    for key, value in drawn.items():
        if found.get(key) != value:
            raise ConfigError(
                f"{key}={value!r}: the baseline {str(file)!r} was measured with {found.get(key)!r}; measure both alike"
            )
    return found
