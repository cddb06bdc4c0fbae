"""The table of the faults: on the terminal, in Markdown, and as JSON."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from lrdint_tune.errors import ConfigError
from lrdint_tune.faults.experiment import DECIMALS, Outcome

BEGIN, END = "<!-- table of faults: begin -->", "<!-- table of faults: end -->"
_HEADER = ("fault", "moment", "reported", "exit codes", "steps lost", "checkpoints lost", "losses", "s", "")


def row(outcome: Outcome) -> tuple[str, ...]:
    """The cells of a line."""
    codes = ", then ".join(" and ".join(map(str, start)) for start in outcome.codes)
    equal = "equal" if outcome.difference <= DECIMALS else f"differ by {outcome.difference:.1e}"
    verdict = "; ".join(outcome.problems) or "ok"
    return (
        outcome.fault,
        outcome.moment,
        "; ".join(line or "nothing" for line in outcome.reported),
        codes,
        str(outcome.steps_lost),
        str(len(outcome.checkpoints_lost)),
        equal,
        f"{outcome.seconds:.0f}",
        verdict,
    )


def terminal_lines(number: int, outcome: Outcome) -> str:
    """One outcome in two lines that fit a terminal."""
    fault, moment, reported, codes, steps, checkpoints, losses, seconds, verdict = row(outcome)
    first = f"{number:>3} {fault:<32} {moment}"
    second = f"exit {codes}; {steps} steps and {checkpoints} checkpoints lost; losses {losses}; {seconds} s; {verdict}"
    width = max(60, shutil.get_terminal_size().columns)
    return "\n    ".join([first[:width], reported[: width - 4], second])


def summary(outcomes: list[Outcome]) -> str:
    """One sentence over all."""
    passed = sum(not outcome.problems for outcome in outcomes)
    equal = sum(outcome.difference <= DECIMALS for outcome in outcomes)
    lost = sum(len(outcome.checkpoints_lost) for outcome in outcomes)
    ended = sum(bool(outcome.codes) and not any(outcome.codes[-1]) for outcome in outcomes)
    return (
        f"{len(outcomes)} faults: {ended} runs got to their end, {equal} with losses equal to 6 decimals, {lost} "
        f"checkpoints lost; {passed} as promised"
    )


def markdown(outcomes: list[Outcome], command: str, notes: list[str]) -> str:
    """The table with the command that made it.

    Args:
        notes: further lines, on what was left out and how the undisturbed run went.
    """
    lines = [f"    {command}", "", *notes, summary(outcomes) + ".", ""]
    lines += ["| | " + " | ".join(_HEADER) + " |", "|---" * (len(_HEADER) + 1) + "|"]
    for number, outcome in enumerate(outcomes, start=1):
        lines.append(f"| {number} | " + " | ".join(cell.replace("|", "\\|") for cell in row(outcome)) + " |")
    return "\n".join(lines) + "\n"


def as_json(outcomes: list[Outcome], about: dict[str, Any]) -> str:
    """Everything, for other programs."""
    return json.dumps({**about, "faults": [dataclasses.asdict(outcome) for outcome in outcomes]}, indent=1)


def check_document(document: Path) -> None:
    """Raises ConfigError unless the file has a place for the table."""
    text = document.read_text() if document.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ConfigError(f"--document {document}: has no lines {BEGIN} and {END}; put them where the table belongs")


def put_into(document: Path, table: str) -> None:
    """Replace what stands between the two lines by ``table``."""
    check_document(document)
    text = document.read_text()
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    document.write_text(f"{head}\n{table}{tail}")
