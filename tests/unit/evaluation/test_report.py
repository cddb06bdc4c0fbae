"""The report: one file that refers to no other, from a run's records, from step files and from model folders."""

import base64
import io
import json
import logging
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lrdint_tune import report as entry
from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.attention_record import as_record, look, shown, spread, step_files
from lrdint_tune.evaluation.heat_map import data_uri, pack, pixels, unpack
from lrdint_tune.evaluation.report import Report, report_of_run, write_report
from lrdint_tune.evaluation.svg import Series, chart, ticks
from tests.common.models import TINY, tiny_model, wake
from tests.common.tiny_run import write_model

REFERENCES = ("src", "href", "xlink:href", "data", "action", "poster", "srcset")


def record(method: str = "dint", **options: Any) -> dict[str, Any]:
    model = wake(tiny_model(method, **options))
    tokens = torch.arange(48)[None] % TINY["vocab_size"]
    return as_record(model, look(model, tokens, top_k=4, heads_shown=2), num_tokens=48, top_k=4)


class _Page(HTMLParser):
    """What a page refers to, its texts by tag, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in REFERENCES]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in REFERENCES]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def read(file: Path) -> _Page:
    """The page, after the checks that hold for every one."""
    text = file.read_text(encoding="utf-8")
    outside = re.sub(r"data:image/png;base64,[\w+/=]+", "", text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link|<iframe", outside, re.IGNORECASE)
    page = _Page(text)
    assert page.open == [] and all(reference.startswith("data:image/png;base64,") for reference in page.references)
    return page


def write_attention(run: Path) -> None:
    """Three records, out of order by name, with curves and a config."""
    folder = run / "attention"
    folder.mkdir(parents=True)
    for step in (0, 9, 10):
        (folder / f"step-{step}.json").write_text(json.dumps({**record(), "step": step}))
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, "loss_metrics/global_avg_loss": 5.0 - i}) + "\n" for i in (1, 2, 3))
    )
    facts = {"config": {"output_dir": "x", "model": {"method": "dint <b>"}}, "metrics": "../metrics.jsonl"}
    (folder / "run.json").write_text(json.dumps(facts))


def test_report_of_a_run(tmp_path: Path) -> None:
    write_attention(tmp_path)
    report = report_of_run(tmp_path)
    assert report.names == ("step 0", "step 10")
    assert report.curves["loss_metrics/global_avg_loss"] == [(1, 4.0), (2, 3.0), (3, 2.0)]
    write_report(report, tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    titles = page.texts["figcaption"]
    expected = ("Nats per token", "Entropy", "first token", "Neg Rat", "4 largest", "λ", "‖O2‖/‖O1‖", "layer 0, head 3")
    for title in expected:
        assert any(title in one for one in titles), title
    assert not any("leak" in one for one in titles)
    assert len(page.references) == 2 * 2 * 2  # layers, heads, before and after
    assert any("dint <b>" in text for text in page.texts["pre"])
    layer = report.after["layers"][1]
    assert any(
        f"step 10, a head, layer 1: {layer['effective']['entropy'][2]:.4g}" in tip for tip in page.texts["title"]
    )
    assert any(f"step 10, layer 1: {layer['o2_o1_ratio']:.4g}" in tip for tip in page.texts["title"])


def test_base_against_a_leaking_model(tmp_path: Path) -> None:
    literal = record(integral="sequence", allow_future_leak=True)
    write_report(Report("a & b", record("none"), literal, ("<base>", "literal")), tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert page.texts["h1"] == ["a & b"] and any("leak" in title for title in page.texts["figcaption"])
    assert any("<base>" in text for text in page.texts["span"])


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    broken = json.loads(json.dumps(record()))
    for layer in broken["layers"]:
        layer["effective"]["entropy"] = [float("nan")] * 4
    write_report(Report("a", broken, broken, ("x", "y")), tmp_path / "report.html")
    assert "no finite value" in read(tmp_path / "report.html").texts["p"]


def test_other_architectures_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(2, 4\) and \(3, 4\)"):
        write_report(Report("a", record(), record(num_layers=3), ("x", "y")), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def run_entry(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    file = str(Path(__file__).parents[3] / "configs" / "report.yaml")
    monkeypatch.setattr(sys, "argv", ["report", "--config", file, *overrides])
    handlers, level = logging.root.handlers[:], logging.root.level
    with pytest.raises(SystemExit) as end:
        entry.recipe_main()
    logging.root.handlers[:] = handlers  # the command's own writes to what this test captures
    logging.root.setLevel(level)
    return int(end.value.code or 0)


def test_command_on_a_run_and_on_model_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_attention(tmp_path / "run")
    assert run_entry(monkeypatch, f"run={tmp_path / 'run'}") == 0
    assert (tmp_path / "run" / "report.html").is_file()
    write_model(tmp_path / "base")
    write_model(tmp_path / "dint", method="dint", rank=2, lam_init=0.5)
    output = tmp_path / "compared.html"
    places = [f"{side}={tmp_path / folder}" for side, folder in (("before", "base"), ("after", "dint"))]
    assert run_entry(monkeypatch, "run=null", *places, f"output={output}", "max_tokens=40", "device=auto") == 0
    page = read(output)
    assert any("40 tokens" not in text and "32 tokens" in text for text in page.texts["p"])  # a multiple of 16
    assert any("Neg Rat" in title for title in page.texts["figcaption"])
    assert run_entry(monkeypatch, "run=null", *places, f"output={output}", "max_tokens=600") != 0
    assert f"max_tokens=600: {tmp_path / 'base'} takes 512 tokens; lower it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run=null"], "give either run, or before and after"),
        (["before=a.json", "after=b.json"], "give either run"),
        (["run=null", "before=a.json"], "give either run"),
        (["run={tmp}"], "attention_probe"),
        (["run=null", "before={tmp}/none.json", "after={tmp}/none.json"], "step-N.json"),
        (["run=null", "before={tmp}/none", "after={tmp}/none"], "no such folder"),
        (["top_k=0"], "top_k=0"),
        (["device=gpu"], "device='gpu': unknown"),
        (["dtype=fp16"], "dtype='fp16': unknown"),
    ],
)
def test_bad_input(
    overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run_entry(monkeypatch, *(one.format(tmp=tmp_path) for one in overrides)) != 0
    assert message in capsys.readouterr().err


def test_heat_maps_survive_the_file_and_have_their_colours() -> None:
    weights = np.array([[1.0, 0.0], [-0.25, 0.25]])
    assert np.array_equal(unpack(pack(torch.tensor(weights))), weights)
    picture = pixels(weights, side=8)
    assert picture.shape == (8, 8, 3) and picture.dtype == np.uint8
    assert picture[0, 0].tolist() == [8, 48, 107] and picture[0, 4].tolist() == [255, 255, 255]
    assert picture[4, 0].tolist() == [252, 146, 114] and picture[7, 7].tolist() == [107, 174, 214]  # root of a quarter
    decoded = Image.open(io.BytesIO(base64.b64decode(data_uri(picture).split(",")[1])))
    assert np.array_equal(np.asarray(decoded), picture)
    assert (pixels(np.zeros((2, 2))) == 255).all()


def test_layers_and_heads_shown() -> None:
    assert shown(30, 9, 4) == {0: [0, 3, 5, 8], 14: [0, 3, 5, 8], 29: [0, 3, 5, 8]}
    assert shown(2, 2, 4) == {0: [0, 1], 1: [0, 1]} and shown(2, 2, 0) == {}
    assert spread(5, 1) == [0]


def test_step_files_are_in_the_order_of_steps(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        (tmp_path / f"step-{step}.json").touch()
    assert list(step_files(tmp_path)) == [3, 20, 100]


def test_charts() -> None:
    assert ticks([0.0, 0.93]) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks([0.0, 1.0], whole=True) == [0.0, 1.0]
    assert len(ticks([3.0])) >= 2 and ticks([0.0, 0.0])[0] < 0 < ticks([0.0, 0.0])[-1]
    drawn = chart("t", [Series("s", [(0, 1.0), (1, 2.0), (2, float("inf"))], "after")], x_label="x", y_label="y")
    (line,) = re.findall(r"points='([^']*)'", drawn)
    (x0, y0), (x1, y1) = [tuple(map(float, point.split(","))) for point in line.split()]
    assert x1 > x0 and y1 < y0  # up is up
