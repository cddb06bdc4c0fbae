"""Rows of a JSONL file as items of a task: a reader per layout of columns, chosen by the columns that are there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from lrdint_tune.errors import ConfigError

Row = Mapping[str, Any]
Item = TypeVar("Item")


class Choices(NamedTuple):
    """A question with several answers.

    Attributes:
        pairs: (context, continuation) of each answer, as they are scored.
        lengths: characters of each answer, without the space before it: what ``acc_norm`` divides by.
        gold: number of the right one.
    """

    pairs: list[tuple[str, str]]
    lengths: list[int]
    gold: int


def choices(context: str, answers: Sequence[str], gold: int) -> Choices:
    """One context, each answer after a space."""
    return Choices([(context, f" {answer}") for answer in answers], [len(a) for a in answers], int(gold))


def options(contexts: Sequence[str], continuation: str, gold: int) -> Choices:
    """Several contexts with one continuation, after a space: the options stand in the middle of a sentence. What
    ``acc_norm`` would divide by is the length of the contexts, which says nothing."""
    return Choices([(c, f" {continuation}") for c in contexts], [len(c) for c in contexts], int(gold))


@dataclass(frozen=True)
class Layout(Generic[Item]):
    """A form that a task's rows may have.

    Attributes:
        columns: by which it is recognised.
        read: a row as an item.
    """

    columns: tuple[str, ...]
    read: Callable[[Row], Item]


def read_items(file: str, layouts: Sequence[Layout[Item]], limit: int | None) -> list[Item]:
    """The items of a JSONL file, the first ``limit`` or all.

    Raises:
        ConfigError: the file cannot be read or is empty, or a row is in none of the layouts; with its line.
    """
    try:
        # Not splitlines(): it also cuts at U+2028 and others, which stand in JSON strings as they are.
        lines = Path(file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"file={file!r}: cannot be read ({error}); give a JSONL file") from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ConfigError(f"file={file!r}: holds no rows; give a JSONL file")
    return [_read(f"{file}:{number}", line, layouts) for number, line in numbered[:limit]]


def _read(where: str, line: str, layouts: Sequence[Layout[Item]]) -> Item:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON ({error}); correct the line") from None
    known = " or ".join(", ".join(layout.columns) for layout in layouts)
    for layout in layouts:
        if isinstance(row, dict) and all(column in row for column in layout.columns):
            try:
                return layout.read(row)
            except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
                raise ConfigError(f"{where}: {type(error).__name__}: {error}; correct the row") from None
    found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise ConfigError(f"{where}: columns {found}; this task reads {known}")
