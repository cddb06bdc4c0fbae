"""``results.json`` of an evaluation, and the table of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrdint_tune.errors import ConfigError, NotSavedError
from lrdint_tune.evaluation.statistics import Difference
from lrdint_tune.export.atomic import atomic_text

RESULTS_FILE = "results.json"
FORMAT = 2


def read_results(key: str, file: Path) -> dict[str, Any]:
    """The content of a results file.

    Args:
        key: of the config, for the message.

    Raises:
        ConfigError: it cannot be read or is none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}={str(file)!r}: cannot be read ({error}); give a {RESULTS_FILE}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("tasks"), dict):
        raise ConfigError(f"{key}={str(file)!r}: not a {RESULTS_FILE} of this version; give one")
    return content


def write_results(file: Path, content: Mapping[str, Any]) -> None:
    """Replace a results file, whole or not at all.

    Raises:
        NotSavedError: it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_text(file, json.dumps({"format": FORMAT, **content}) + "\n")
    except OSError as error:
        raise NotSavedError(f"output_dir={str(file.parent)!r}: cannot be written ({error}); make room there") from None


def table(results: Mapping[str, Any], differences: Mapping[str, Mapping[str, Difference]]) -> str:
    """One line per metric: estimate, standard error, items, and the difference to the baseline with its interval."""
    rows = [("task", "metric", "value", "stderr", "n", "minus baseline", "95% interval")]
    for name, result in results.items():
        for metric, estimate in result["metrics"].items():
            difference = differences.get(name, {}).get(metric)
            against = ("", "")
            if difference is not None:
                against = (f"{difference.mean:+.4f}", f"{difference.low:+.4f} .. {difference.high:+.4f}")
            rows.append(
                (name, metric, _number(estimate["mean"]), _number(estimate["stderr"]), str(estimate["n"]), *against)
            )
    columns = range(len(rows[0]) if differences else len(rows[0]) - 2)
    widths = [max(len(row[i]) for row in rows) for i in columns]
    lines = ["  ".join(f"{row[i]:<{widths[i]}}" for i in columns).rstrip() for row in rows]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
