"""``on_bad_row=skip`` in a run: what is told and recorded, also after a restart."""

import json
from pathlib import Path

from tests.common.tiny_run import read_losses
from tests.distributed.harness import run_recipe
from tests.integration.runs import finished_run, killed, values


def test_count_in_the_metrics(config: Path, tmp_path: Path) -> None:
    rows = (config.parent / "train.jsonl").read_text().splitlines()
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([*rows[:5], "{oops", json.dumps({"question": 3}), *rows[5:]]))
    options = [f"output_dir={tmp_path}", f"dataset.data_files={file}", "dataset.on_bad_row=skip"]
    killed(config, *options, step=4, size=2)
    outcome = run_recipe(config, *options, size=2)
    assert outcome.codes == [0, 0], outcome.outputs
    told = [line.strip() for line in outcome.lines if "rows.jsonl" in line]
    assert sum("2 of 122 rows are bad and left out" in line for line in told) == 1
    assert sum("line 6 is not valid JSON" in line for line in told) == 1
    assert sum("line 7 of" in line and "holds int" in line for line in told) == 1
    assert "are bad" not in outcome.outputs[1]
    assert values(tmp_path, "data/bad_rows") == {0: 2}
    assert values(tmp_path, "data/bad_rows_val") == {}


def test_nothing_else_changes(config: Path, finished: Path, tmp_path: Path) -> None:
    """The same rows in the same order, as if the bad ones were not there: the losses are equal."""
    rows = (config.parent / "train.jsonl").read_text().splitlines()
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([*rows, "{oops"]))
    options = [f"dataset.data_files={file}", "dataset.on_bad_row=skip", "dataset_val.on_bad_row=skip"]
    finished_run(config, f"output_dir={tmp_path}", *options)
    assert read_losses(tmp_path) == read_losses(finished)
    assert values(tmp_path, "data/bad_rows") == {0: 1}
    assert values(tmp_path, "data/bad_rows_val") == {0: 0}
