"""Runs with an attention probe: the same run, the same records on one rank and two, across a restart, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.attention_maps import STATISTICS, attention_statistics
from lrdint_tune.evaluation.attention_record import step_files
from lrdint_tune.evaluation.loading import load_model
from lrdint_tune.evaluation.probe_text import PROBE_TEXT, probe_tokens
from tests.common.compiling import skip_inductor
from tests.common.tiny_run import read_losses, write_run
from tests.distributed.steps import read_config, start_trainer
from tests.integration.runs import assert_one_curve, finished_run, killed

PROBE = {"every_n_steps": 3, "max_tokens": 64, "heads_shown": 2}
SHORT: dict[str, Any] = {"max_steps_per_epoch": 4, "global_batch_size": 2, "dataset_val": None, "epochs": 2}
STEPS = [0, 3, 6, 8]


def records(run: Path) -> dict[int, dict[str, Any]]:
    files = (run / "attention").glob("step-*.json")
    return {
        step: data for step, data in sorted((data["step"], data) for data in (json.loads(f.read_text()) for f in files))
    }


def assert_same_numbers(got: Any, want: Any) -> None:
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for key in want:
            assert_same_numbers(got[key], want[key])
    elif isinstance(want, list):
        for one, other in zip(got, want, strict=True):
            assert_same_numbers(one, other)
    elif isinstance(want, float):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-5)
    else:
        assert got == want


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("probe"), **SHORT, attention_probe=PROBE)


@pytest.mark.slow
def test_records_of_a_run(config: Path) -> None:
    """On one rank and two, and of a run that is killed between two records and goes on."""
    folder = config.parent
    finished_run(config, f"output_dir={folder / 'one'}")
    finished_run(config, f"output_dir={folder / 'off'}", "attention_probe=null")
    killed(config, f"output_dir={folder / 'two'}", step=5, size=2)
    finished_run(config, f"output_dir={folder / 'two'}", size=2)
    one, two = records(folder / "one"), records(folder / "two")
    assert list(one) == list(two) == STEPS
    for step in STEPS:
        assert_same_numbers(two[step]["layers"], one[step]["layers"])
        assert one[step]["heat_maps"].keys() == two[step]["heat_maps"].keys()
    assert read_losses(folder / "one") == read_losses(folder / "off")  # looking changes nothing
    assert not (folder / "off" / "attention").exists() and not (folder / "off" / "report.html").exists()
    assert (folder / "one" / "report.html").is_file() and (folder / "two" / "report.html").is_file()
    for run in ("one", "two"):
        assert_one_curve(folder / run)

    # The last record is that of the exported model.
    loaded = load_model(folder / "one" / "hf")
    tokens = probe_tokens(loaded.tokenizer, max_tokens=64)
    assert_same_numbers(one[8]["layers"], attention_statistics(loaded.model, tokens)["layers"])
    assert one[8]["layers"][0]["lambda"]["mean"] != one[0]["layers"][0]["lambda"]["mean"] == 0

    events = EventAccumulator(str(folder / "one"), size_guidance={"scalars": 0, "histograms": 0, "images": 0}).Reload()
    tags = events.Tags()
    for name in STATISTICS:
        curve = events.Scalars(f"attention/{name}/layers.1")
        heads = [record["layers"][1]["effective"][name] for record in one.values()]
        assert [event.step for event in curve] == STEPS
        assert [event.value for event in curve] == pytest.approx([sum(h) / len(h) for h in heads], rel=1e-5, abs=1e-7)
        assert [h.step for h in events.Histograms(f"attention/{name}")] == STEPS
    pictures = sorted(tag for tag in tags["images"] if tag.startswith("attention/"))
    assert pictures == [f"attention/layers.{i}/head.{h}" for i in (0, 1) for h in (0, 3)]
    assert all(events.Images(tag)[0].width == 256 for tag in pictures)


@pytest.mark.slow
def test_records_of_a_compiled_run(config: Path) -> None:
    """The look goes round the compiled blocks, and what they compiled serves on after it."""
    folder = config.parent
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        finished_run(config, f"output_dir={folder / name}", f"compile={compiled}", "epochs=1", prepare=[skip_inductor])
    eager, compiled_records = records(folder / "eager"), records(folder / "compiled")
    assert list(compiled_records) == list(eager) == [0, 3, 4]
    for step, record in eager.items():
        assert_same_numbers(compiled_records[step]["layers"], record["layers"])
    want = read_losses(folder / "eager")
    assert read_losses(folder / "compiled") == {step: pytest.approx(loss, abs=1e-5) for step, loss in want.items()}


def test_a_full_disk_ends_nothing(config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = start_trainer(config, {"output_dir": str(tmp_path / "out")})
    assert trainer.probe is not None
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "attention").write_text("no folder")  # nothing can be written there
    trainer.recorder.open(resumed_step=0)
    trainer.probe.start(0)
    trainer.probe.record(trainer.model, 0, trainer.recorder)
    trainer.probe.report()
    assert caplog.text.count("cannot be written") == 2 and "not written" in caplog.text
    assert trainer.recorder.history("attention/entropy/layers.0")


def test_a_new_run_forgets_the_records_of_an_earlier_one(config: Path, tmp_path: Path) -> None:
    trainer = start_trainer(config, {"output_dir": str(tmp_path)})
    assert trainer.probe is not None
    (tmp_path / "attention").mkdir()
    for step in (0, 2, 99):
        (tmp_path / "attention" / f"step-{step}.json").write_text("{}")
    trainer.probe.start(3)
    assert list(step_files(tmp_path / "attention")) == [0, 2], "step 99 is of the part that a resumed run abandons"
    assert trainer.probe.is_missing(3, 8) and not trainer.probe.is_missing(4, 8) and trainer.probe.is_missing(8, 8)
    trainer.probe.start(0)
    assert not step_files(tmp_path / "attention")


def test_the_text(config: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    trainer = start_trainer(config, {"attention_probe": {"text_file": str(tmp_path / "text")}})
    assert trainer.probe is not None
    assert trainer.probe.tokens.shape == (1, 5)  # no BOS, as its files say; less than sixteen stay as they are
    trainer = start_trainer(config, {})
    assert trainer.probe is not None and trainer.probe.tokens.shape == (1, 64) and len(PROBE_TEXT.split()) > 300
    assert trainer.probe.tokens.dtype == torch.int64


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"every_steps": 3}, "attention_probe: unknown key every_steps=3; valid keys: every_n_steps"),
        ({"every_n_steps": 0}, "attention_probe.every_n_steps=0"),
        ({"top_k": True}, "attention_probe.top_k=True"),
        ({"heads_shown": -1}, "attention_probe.heads_shown=-1"),
        ({"text_file": 3}, "attention_probe.text_file=3"),
    ],
)
def test_refused_options(section: dict[str, Any], message: str, config: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(config, {"attention_probe": section})


@pytest.mark.parametrize("key", ["context_parallel_dim", "tensor_parallel_dim"])
def test_refused_with_parts_of_a_sequence_or_layer(key: str, config: Path) -> None:
    with pytest.raises(ConfigError, match=f"attention_probe: is not there for {key}=2"):
        read_config(config, {key: 2})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"max_tokens": 513}, "max_tokens=513: the model takes 512"),
        ({"text_file": "/nowhere"}, "text_file='/nowhere': cannot be read"),
        ({"text_file": "/dev/null"}, "holds no text"),
    ],
)
def test_refused_before_weights_load(section: dict[str, Any], message: str, config: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        start_trainer(config, {"attention_probe": section})
