"""What a run has left so far: steps and losses in ``metrics.jsonl``, checkpoints, results, and what it said."""

from __future__ import annotations

import json
import re
from pathlib import Path

TRAINING_LOSS = "loss_metrics/global_avg_loss"
HELDOUT_LOSS = "validation_metrics/loss"
_CHECKPOINT = re.compile(r"step-(\d+)")


def read_losses(output_dir: Path, tag: str = TRAINING_LOSS) -> dict[int, float]:
    """Step -> loss, in nats, from ``metrics.jsonl``."""
    lines = [json.loads(line) for line in _metrics(output_dir).read_text().splitlines()]
    return {line["step"]: line[tag] for line in lines if tag in line}


def recorded_step(output_dir: Path) -> int:
    """The last step that is recorded in full; 0 before the first."""
    try:
        whole = _metrics(output_dir).read_text().rpartition("\n")[0]
    except OSError:
        return 0
    return int(whole.rpartition('{"step": ')[2].split(",")[0]) if whole else 0


def published(checkpoints: Path) -> dict[int, Path]:
    """Step -> folder of the checkpoints that are whole by their names, oldest first."""
    try:
        found = [(_CHECKPOINT.fullmatch(path.name), path) for path in checkpoints.iterdir()]
    except OSError:
        return {}
    steps = {int(m.group(1)): path for m, path in found if m and (path / "train_state.json").is_file()}
    return dict(sorted(steps.items()))


def results(output_dir: Path) -> set[str]:
    """The files of the exported model."""
    folders = [output_dir / name for name in ("adapter", "hf")]
    return {str(file.relative_to(output_dir)) for folder in folders for file in folder.rglob("*") if file.is_file()}


def said(log: Path) -> list[str]:
    """The lines of a log. A progress bar's states are lines of their own, and so is an error that comes after one."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    return [line.strip() for line in re.split(r"[\r\n]+|(?<=\])(?=error: )", text) if line.strip()]


def resumed_step(lines: list[str]) -> int:
    """The step that a start went on from, by what it said; 0: from the beginning."""
    steps = [int(m.group(1)) for line in lines if (m := re.search(r"resuming from \S*step-(\d+)", line))]
    return steps[-1] if steps else 0


def _metrics(output_dir: Path) -> Path:
    return output_dir / "logs" / "metrics.jsonl"
