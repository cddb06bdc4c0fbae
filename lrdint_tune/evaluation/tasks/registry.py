"""Entries of ``tasks``, by the name under ``task``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.lm_eval_bridge import measure_with_lm_eval, require_lm_eval
from lrdint_tune.evaluation.measured import Measured
from lrdint_tune.evaluation.needle import NeedleTask
from lrdint_tune.evaluation.scoring import Scorer
from lrdint_tune.evaluation.tasks.digests import local_digests
from lrdint_tune.evaluation.tasks.held_out import LongTextTask, NllTask
from lrdint_tune.evaluation.tasks.lambada import measure_lambada
from lrdint_tune.evaluation.tasks.multiple_choice import TASKS as MULTIPLE_CHOICE
from lrdint_tune.training.config import check_choice, load_config


class Task(Protocol):
    """An entry of ``tasks``, a dataclass of its options."""

    @property
    def task(self) -> str: ...

    @property
    def name(self) -> str | None: ...

    def places(self) -> dict[str, Any]: ...

    def versions(self) -> dict[str, str]: ...

    def measure(self, scorer: Scorer, seed: int) -> Measured: ...


@dataclass(frozen=True)
class FileTask:
    """A task on a JSONL file.

    Attributes:
        task: its name.
        file: the JSONL file; with ``source: lm_eval`` None is the hub's data.
        limit: only the first so many items.
        name: under which the results stand; None: the task's name.
        source: ``file``: prompts and metrics are this package's own, ``lm_eval``: those of the installed lm-eval.
    """

    task: str
    file: str | None = None
    limit: int | None = None
    name: str | None = None
    source: str = "file"

    def __post_init__(self) -> None:
        check_choice("source", self.source, SOURCES)
        if self.source == "lm_eval":
            require_lm_eval()
        elif self.file is None:
            raise ConfigError("file: missing; give a JSONL file, or source: lm_eval for the hub's data")
        if self.file is not None and not Path(self.file).is_file():
            raise ConfigError(f"file={self.file!r}: no such file; give a JSONL file")
        if self.limit is not None and self.limit < 2:
            raise ConfigError(f"limit={self.limit}: must be at least 2, for a standard error")

    def places(self) -> dict[str, Any]:
        return {"file": self.file}

    def versions(self) -> dict[str, str]:
        """Of other packages whose code decides the numbers."""
        return {"lm_eval": version("lm_eval")} if self.source == "lm_eval" else {}

    def measure(self, scorer: Scorer, seed: int) -> Measured:
        if self.source == "lm_eval":
            return measure_with_lm_eval(scorer, self.task, self.file, self.limit, seed)
        assert self.file is not None  # checked above
        if self.task == "lambada":
            return measure_lambada(scorer, self.file, self.limit)
        return MULTIPLE_CHOICE[self.task].measure(scorer, self.file, self.limit)


SOURCES = ("file", "lm_eval")
KINDS: dict[str, type[Any]] = {
    **dict.fromkeys([*MULTIPLE_CHOICE, "lambada"], FileTask),
    "wikitext": LongTextTask,
    "nll": NllTask,
    "needle": NeedleTask,
}


def build_tasks(entries: Sequence[Any]) -> dict[str, Task]:
    """Result name -> task, for the entries of a config's ``tasks``.

    Raises:
        ConfigError: an entry without a known ``task``, a wrong option, or two entries of one name; it says which.
    """
    tasks: dict[str, Task] = {}
    for number, entry in enumerate(entries):
        where = f"tasks[{number}]"
        if not isinstance(entry, dict) or "task" not in entry:
            raise ConfigError(f"{where}={entry!r}: has no task; give one of {', '.join(KINDS)}")
        # lm-eval has tasks of its own beyond these.
        from_lm_eval = entry.get("source") == "lm_eval"
        if entry["task"] not in KINDS and not from_lm_eval:
            raise ConfigError(f"{where}.task={entry['task']!r}: unknown; choose from {', '.join(KINDS)}")
        try:
            task = load_config(entry, FileTask if from_lm_eval else KINDS[entry["task"]])
        except ConfigError as error:
            raise ConfigError(f"{where}, {entry['task']}: {error}") from None
        name = task.name or task.task
        if name in tasks:
            raise ConfigError(f"{where}.name={name!r}: is taken by an earlier entry; give each its own name")
        tasks[name] = task
    return tasks


def settings(task: Task) -> dict[str, Any]:
    """What the numbers of a task depend on, as JSON values: its options, ``digests`` (option -> those of the local
    files behind it, for every option of :meth:`Task.places` that has some), and ``versions`` of others' code."""
    options = {key: value for key, value in asdict(task).items() if key != "name"}  # type: ignore[call-overload]
    digests = {key: local_digests(place) for key, place in task.places().items()}
    found = {key: digest for key, digest in digests.items() if digest is not None}
    return options | {"digests": found, "versions": task.versions()}
