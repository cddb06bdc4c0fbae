"""Reading what a run leaves behind while it is still writing."""

from pathlib import Path

from lrdint_tune.faults.experiment import reported
from lrdint_tune.faults.record import published, recorded_step, resumed_step, said


def metrics(folder: Path, text: str) -> Path:
    (folder / "logs").mkdir(exist_ok=True)
    (folder / "logs" / "metrics.jsonl").write_text(text)
    return folder


def test_the_last_whole_line_counts(tmp_path: Path) -> None:
    assert recorded_step(tmp_path) == 0
    assert recorded_step(metrics(tmp_path, '{"step": 0, "v": 1.0}\n{"step": 12, "l": 2.0}\n{"step": 13, "')) == 12
    assert recorded_step(metrics(tmp_path, '{"step": 1')) == 0


def test_published_checkpoints_have_their_name_and_manifest(tmp_path: Path) -> None:
    for name in ("step-10", "step-9", "step-8.partial", "damaged-step-7"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train_state.json").touch()
    (tmp_path / "step-11").mkdir()
    assert list(published(tmp_path)) == [9, 10]
    assert published(tmp_path / "absent") == {}


def test_lines_are_found_behind_a_progress_bar(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(
        b"resuming from /x/checkpoints/step-8\n\rstep: 5%\r      \rstep: 9% [2s, loss=1]error: no room\n\xff\n"
    )
    assert said(log) == [
        "resuming from /x/checkpoints/step-8",
        "step: 5%",
        "step: 9% [2s, loss=1]",
        "error: no room",
        "\N{REPLACEMENT CHARACTER}",
    ]
    assert resumed_step(said(log)) == 8
    assert resumed_step(["step-9 stands"]) == 0


def test_the_line_that_fits_is_what_was_reported() -> None:
    start, again = ["error: other", "rank 1 died", "error: rank 2 died"], ["error: rank 3 died"]
    assert reported([start, again], r"rank \d died") == "error: rank 2 died"
    assert reported([start[:2], again], "rank 1") == "rank 1 died"
    assert reported([start, again], "fire") == "error: other"
    assert reported([["all well"]], "fire") == ""
