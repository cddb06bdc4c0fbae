"""``prefix_wise_positions`` in real runs: what is recorded is the same on any number of ranks."""

import json
from pathlib import Path

import pytest

from tests.common.tiny_run import write_run
from tests.integration.runs import SHORT, finished_run

LITERAL = ("model.integral=sequence", "model.allow_future_leak=true")


def validations(output_dir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output_dir / "logs" / "metrics.jsonl").read_text().splitlines()]
    groups = ("validation_metrics/", "training_rows/")
    return [
        {k: v for k, v in line.items() if k.startswith(groups)} for line in lines if "validation_metrics/loss" in line
    ]


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(tmp_path: Path) -> None:
    config = write_run(tmp_path, **{**SHORT, "epochs": 1}, prefix_wise_positions=40, lam_lr=0.3)
    for size in (1, 2):
        finished_run(config, *LITERAL, f"output_dir={tmp_path}/{size}", size=size)
    one, two = (validations(tmp_path / str(size)) for size in (1, 2))
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, abs=2e-5)
    before, after = one
    assert before["validation_metrics/leak"] == pytest.approx(0, abs=1e-6)
    assert abs(after["training_rows/leak"]) > 1e-4 and after["training_rows/leak_stderr"] > 0
