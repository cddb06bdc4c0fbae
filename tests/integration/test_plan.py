"""The plan command: what it says, how it ends, and that the scaling guide is what it said."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.scaling_table import DOCUMENT, GIB, ROWS, Row, plan_row, read
from lrdint_tune.plan import recipe_main

ROOT = Path(__file__).parents[2]
ALL_ROWS = [row for rows in ROWS.values() for row in rows]


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, config: str, *overrides: str
) -> tuple[int, str, str]:
    """Exit code, output and errors of the command."""
    monkeypatch.setattr(sys, "argv", ["plan", "--config", str(ROOT / "configs" / config), *overrides])
    with pytest.raises(SystemExit) as ended:
        recipe_main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_fits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The config names files of another machine; none is looked for."""
    file = tmp_path / "plan.json"
    code, out, _ = run(capsys, monkeypatch, "llama3_2_1b_dint.yaml", "world_size=16", "gpu=h100", f"output={file}")
    assert code == 0
    assert out.startswith("ESTIMATE for 16 x H100 SXM")
    for words in ("fits", "FLOPs per token", "all-gather over shard, forward", "tokens/s", "MFU"):
        assert words in out, words
    plan = json.loads(file.read_text())
    assert plan["estimate"] and plan["plan"]["fits"] and not plan["advice"]
    assert sum(plan["plan"]["memory"]["peak"].values()) == plan["plan"]["peak_bytes"]
    total = re.search(r"total +([\d.]+)", out)
    assert total is not None and float(total[1]) == pytest.approx(plan["plan"]["peak_bytes"] / GIB, abs=1e-3)


def test_does_not_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What it names makes it fit: exit code 4 without, 0 with the first override."""
    arguments = ("llama3_2_1b_dint.yaml", "world_size=1", "gpu=rtx4090")
    code, out, _ = run(capsys, monkeypatch, *arguments)
    assert code == 4
    assert "DOES NOT FIT" in out
    first = re.search(r"cheapest first.*\n +([\d.]+) GiB +(\S.*)", out)
    assert first is not None
    code, out, _ = run(capsys, monkeypatch, *arguments, *first[2].split())
    assert code == 0
    total = re.search(r"total +([\d.]+)", out)
    assert total is not None and float(total[1]) == pytest.approx(float(first[1]), abs=0.06)


def test_cpu_has_no_figures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(capsys, monkeypatch, "quickstart.yaml", "world_size=2", "gpu=cpu")
    assert code == 0
    assert "of an unknown amount" in out and "time of a step: unknown" in out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["gpu=h100"], "error: world_size: missing"),
        (
            ["gpu=h100", "world_size=3", "data_parallel_shard_dim=2"],
            "error: data_parallel_shard_dim=2: 1 (replicate) x 2",
        ),
        (["gpu=h100", "world_size=8", "modle.rank=3"], "error: config: unknown key modle"),
        (["gpu=h100", "world_size=8", "output=/no/such/folder/plan.json"], "error: output='/no/such/folder/plan.json'"),
        (["gpu=h100", "world_size=24", "tensor_parallel_dim=3"], "error: tensor_parallel_dim=3: does not divide"),
    ],
    ids=str,
)
def test_bad_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    code, _, err = run(capsys, monkeypatch, "llama3_2_1b_dint.yaml", *overrides)
    assert code == 2
    assert err.splitlines()[-1].startswith(message)


def test_tune_run() -> None:
    """As the documents say it."""
    words = "run lrdint_tune/plan --config configs/quickstart.yaml world_size=2 gpu=cpu".split()
    command = [str(Path(sys.executable).parent / "tune"), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "ESTIMATE for 2 x CPU process" in done.stdout


def test_readme_shows_the_output(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line under the command, and the command as it stands."""
    text = (ROOT / "README.md").read_text()
    found = re.search(r"    tune run lrdint_tune/plan --config configs/(\S+) (.*)\n\n((?:    .*\n)+)", text)
    assert found is not None
    _, out, _ = run(capsys, monkeypatch, found[1], *found[2].split())
    lines = [line.rstrip() for line in out.splitlines()]
    for line in found[3].splitlines():
        assert line[4:] in lines


@pytest.mark.slow
def test_70b_on_512_in_two_minutes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    begin = time.monotonic()
    code, out, _ = run(capsys, monkeypatch, "llama3_1_70b_dint.yaml", "world_size=512", "gpu=h100")
    assert time.monotonic() - begin < 120
    assert code == 0 and "70.9 B parameters" in out


# ------------------------------------------------------------------ docs/scaling.md


@pytest.mark.parametrize("row", ALL_ROWS, ids=lambda row: f"{row.model}-{row.ranks}-{row.gpu}")
def test_row_stands_in_the_document(row: Row) -> None:
    read(row)
    assert len(lines_of(row)) == 1


def lines_of(row: Row) -> list[str]:
    start = f"| {row.model} | {row.ranks} {row.gpu} | `{row.config}`"
    return [
        line
        for line in DOCUMENT.read_text().splitlines()
        if line.startswith(start) and all(f"`{override}`" in line for override in row.overrides)
    ]


def check(row: Row) -> None:
    """It fits, and the document's peak is the plan's; else run ``python -m benchmarks.scaling_table``."""
    plan = plan_row(row)
    assert plan.fits
    (line,) = lines_of(row)
    written = re.search(r"\| ([\d.]+) of [\d.]+ \|", line)
    assert written is not None and float(written[1]) == pytest.approx(plan.memory.total / GIB, rel=0.02)


@pytest.mark.parametrize("row", [ALL_ROWS[0], ALL_ROWS[6]], ids=lambda row: f"{row.model}-{row.ranks}")
def test_row(row: Row) -> None:
    check(row)


@pytest.mark.slow
@pytest.mark.parametrize("row", ALL_ROWS, ids=lambda row: f"{row.model}-{row.ranks}-{row.gpu}")
def test_every_row(row: Row) -> None:
    check(row)


def test_sizes_and_numbers_of_gpus() -> None:
    rows = {(row.model, row.ranks) for row in ROWS["H100"]}
    wanted = {(model, ranks) for model in ("1B", "8B", "70B") for ranks in (1, 8, 64, 512)}
    assert wanted - rows == {("70B", 1)}  # the document says why
    assert "70B on one GPU" in DOCUMENT.read_text()
