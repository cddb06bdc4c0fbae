"""What TensorBoard's own server code makes of a record: names of runs, hyperparameters, charts, texts."""

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler
from tensorboard.plugins.scalar.scalars_plugin import ScalarsPlugin

from lrdint_tune.attention import METHODS, method_options
from lrdint_tune.training.charts import CHARTS, charts_of
from lrdint_tune.training.components import build_recorder
from lrdint_tune.training.config import load_config
from lrdint_tune.training.hparams import columns, hyperparameters
from lrdint_tune.training.metrics import TensorBoardLogger
from lrdint_tune.training.recording import finish_record, start_record

PIXELS = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


class Board:
    """TensorBoard over a folder, without its web server."""

    def __init__(self, logdir: Path) -> None:
        multiplexer = EventMultiplexer(purge_orphaned_data=True)
        multiplexer.AddRunsFromDirectory(str(logdir))
        multiplexer.Reload()
        self.multiplexer = multiplexer
        provider: Any = MultiplexerDataProvider(multiplexer, str(logdir))
        self.context = TBContext(data_provider=provider, multiplexer=multiplexer, plugin_name_to_instance={})
        self.context.plugin_name_to_instance["scalars"] = ScalarsPlugin(self.context)  # type: ignore[index]

    def runs(self) -> list[str]:
        return sorted(self.multiplexer.Runs())

    def rows(self) -> dict[str, Any]:
        """Run -> its row of the hyperparameter tab."""
        request = api_pb2.ListSessionGroupsRequest(
            start_index=0,
            slice_size=100,
            allowed_statuses=[api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_RUNNING],
        )
        found = Handler(RequestContext(), Context(self.context), "", request).run()
        return {group.sessions[0].name: group for group in found.session_groups}

    def charts(self) -> dict[str, dict[str, list[str]]]:
        """Category -> title of a chart -> its regular expressions, of all runs."""
        layout = json.loads(CustomScalarsPlugin(self.context).layout_impl(RequestContext(), ""))
        return {
            category["title"]: {chart["title"]: chart["multiline"]["tag"] for chart in category["chart"]}
            for category in layout["category"]
        }

    def curves(self, run: str, pattern: str) -> list[str]:
        """The tags that a chart with that regular expression shows."""
        found = CustomScalarsPlugin(self.context).scalars_impl(RequestContext(), run, pattern, "")
        return sorted(found["tag_to_events"])


def config(output_dir: Path, method: str = "dint", **model: Any) -> Any:
    return load_config(
        {
            "output_dir": str(output_dir),
            "tokenizer": {"_component_": "t"},
            "model": {"_component_": "m", "method": method, **model},
            "checkpointer": {"checkpoint_dir": "base"},
            "dataset": {"_component_": "d"},
            "optimizer": {"_component_": "o", "lr": 0.5},
            "trainable": ["adapter", "attention"],
        }
    )


def start(output_dir: Path, method: str = "dint", *, resumed_step: int = 0, **model: Any) -> TensorBoardLogger:
    cfg = config(output_dir, method, **model)
    options = {**method_options(method), **model}
    recorder = build_recorder(cfg)
    hparams = hyperparameters(cfg, options, global_batch_size=4, steps=10)
    start_record(recorder, cfg, hparams, parameters="a table", counts={}, resumed_step=resumed_step)
    return recorder


def values(row: Any) -> dict[str, Any]:
    return {name: value.string_value or value.number_value for name, value in row.hparams.items()}


def results(row: Any) -> dict[str, float]:
    return {result.name.tag: result.value for result in row.metric_values}


def test_runs_by_name_and_hyperparameters(tmp_path: Path) -> None:
    """A finished run and one under way, in folders of their names, each with its values and latest results."""
    done = start(tmp_path / "with_dint", rank=4, secondary_scale=2.0)
    for step, loss in enumerate([3.0, 2.0, 1.0]):
        done.log({"loss_metrics/global_avg_loss": loss, "validation_metrics/loss": loss + 1}, step)
    finish_record(done, {})
    going = start(tmp_path / "control", "none")
    going.log({"loss_metrics/global_avg_loss": 5.0}, 1)

    board = Board(tmp_path)
    assert board.runs() == ["control", "with_dint"]
    rows = board.rows()
    assert set(rows) == {"control", "with_dint"}
    given = values(rows["with_dint"])
    assert (given["method"], given["rank"], given["lr"], given["trainable"]) == ("dint", 4, 0.5, "adapter+attention")
    assert (given["secondary_scale"], given["lam"], given["factors"]) == ("2.0", "learned", "per_head")
    assert (given["steps"], given["global_batch_size"], given["checkpoint_dir"]) == (10, 4, "base")
    assert "lam_lr" not in given and "lam_init" not in given  # null: a blank field
    assert results(rows["with_dint"]) == {"loss_metrics/global_avg_loss": 1.0, "validation_metrics/loss": 2.0}
    assert rows["with_dint"].sessions[0].status == api_pb2.STATUS_SUCCESS
    assert values(rows["control"])["method"] == "none" and "rank" not in values(rows["control"])
    assert results(rows["control"]) == {"loss_metrics/global_avg_loss": 5.0}
    assert rows["control"].sessions[0].status != api_pb2.STATUS_SUCCESS


@pytest.mark.parametrize("method", METHODS)
def test_every_value_has_a_column(method: str, tmp_path: Path) -> None:
    given = hyperparameters(config(tmp_path, method), method_options(method), global_batch_size=1, steps=1)
    assert set(given) <= set(columns())
    assert not any(value in ("None", "null") for value in given.values())


def test_adapters_are_named(tmp_path: Path) -> None:
    cfg = config(tmp_path, "none", adapters=[{"type": "lora", "target_modules": ["q_proj"]}, {"type": "bottleneck"}])
    assert hyperparameters(cfg, {}, global_batch_size=1, steps=1)["adapters"] == "lora+bottleneck"


def test_charts_hold_what_belongs_together(tmp_path: Path) -> None:
    tags = ["lambda_mean/layers.0", "lambda_mean/layers.11", "lambda_min/layers.0", "tflops", "tflops_causal"]
    for name, method in (("a", "none"), ("b", "dint"), ("c", "dint")):
        start(tmp_path / name, method).log(dict.fromkeys([*tags, "validation_metrics/loss"], 1.0), 1)
    board = Board(tmp_path)
    charts = board.charts()
    assert list(charts)[0] == "loss" and len(charts) == len(set(charts))
    [pattern] = charts["λ per layer"]["mean over heads"]
    assert board.curves("b", pattern) == tags[:2]
    assert board.curves("c", charts["throughput"]["TFLOP/s per device"][0]) == ["tflops"]
    assert "leak" not in charts


def test_control_alone_has_no_charts_of_layers(tmp_path: Path) -> None:
    start(tmp_path / "a", "none")
    assert "λ per layer" not in Board(tmp_path).charts()


def test_a_leak_that_is_measured_has_charts(tmp_path: Path) -> None:
    cfg = dataclasses.replace(config(tmp_path), dataset_val={"_component_": "d"}, prefix_wise_positions=8)
    assert "leak" in charts_of(cfg)
    tags = [tag for tags in CHARTS["leak"]["leak"].values() for tag in tags]
    assert {"validation_metrics/leak", "training_rows/leak", "validation_metrics/prefix_wise_loss"} <= set(tags)


def test_no_chart_has_a_tag_that_tensorboard_cannot_draw() -> None:
    """Parentheses, from which it takes the run's name."""
    tags = [tag for group in CHARTS.values() for charts in group.values() for tags in charts.values() for tag in tags]
    assert tags and not any("(" in tag for tag in tags)


def test_a_new_run_in_the_same_folder_is_another_row(tmp_path: Path) -> None:
    """TensorBoard would go on showing the first hyperparameters, and every tag that only the old run had."""
    start(tmp_path / "run", "dint").log({"lambda_mean/layers.0": 1.0}, 1)
    start(tmp_path / "run", "none").log({"loss_metrics/global_avg_loss": 1.0}, 1)
    board = Board(tmp_path)
    assert board.runs() == ["run"]
    assert values(board.rows()["run"])["method"] == "none"
    assert board.curves("run", ".*") == ["loss_metrics/global_avg_loss"]
    assert len(list((tmp_path / "run").glob("replaced.*"))) == 1  # nothing is deleted


def test_resumed_run_is_one_row_with_one_of_everything(tmp_path: Path) -> None:
    for resumed_step, last in ((0, 4), (2, 6)):
        recorder = start(tmp_path / "run", resumed_step=resumed_step)
        for step in range(resumed_step + 1, last + 1):
            recorder.log({"loss_metrics/global_avg_loss": float(step + resumed_step)}, step)
            recorder.log_images({"attention/map": PIXELS}, step)
            recorder.log_histograms({"attention/entropy": torch.full((3,), float(step))}, step)
    finish_record(recorder, {})
    board = Board(tmp_path)
    [row] = board.rows().values()
    assert results(row) == {"loss_metrics/global_avg_loss": 8.0}
    tags = board.multiplexer.Runs()["run"]["tensors"]
    assert {"config/text_summary", "parameters/text_summary", "attention/map", "attention/entropy"} <= set(tags)
    for tag in tags:
        steps = [event.step for event in board.multiplexer.Tensors("run", tag)]
        # One is shown of what has no step.
        expected = range(1, 7) if tag in ("attention/map", "attention/entropy", "loss_metrics/global_avg_loss") else [0]
        assert steps == list(expected), tag


def test_a_run_resumed_elsewhere_is_described_there(tmp_path: Path) -> None:
    """From a checkpoint of another output_dir: the record there has no beginning."""
    start(tmp_path / "run", resumed_step=3).log({"loss_metrics/global_avg_loss": 1.0}, 4)
    board = Board(tmp_path)
    assert values(board.rows()["run"])["method"] == "dint"
    assert "config/text_summary" in board.multiplexer.Runs()["run"]["tensors"]


def test_images_and_histograms(tmp_path: Path) -> None:
    recorder = start(tmp_path / "run")
    recorder.log_images({"attention/map": PIXELS}, 7)
    recorder.log_histograms({"attention/entropy": torch.tensor([[0.0, 1.0], [1.0, float("nan")]])}, 7)
    board = Board(tmp_path)
    [picture] = board.multiplexer.Tensors("run", "attention/map")
    width, height, png = picture.tensor_proto.string_val
    assert (picture.step, width, height) == (7, b"5", b"4") and png.startswith(b"\x89PNG")
    [counted] = board.multiplexer.Tensors("run", "attention/entropy")
    buckets = np.frombuffer(counted.tensor_proto.tensor_content, np.float32).reshape(-1, 3)
    assert counted.step == 7 and buckets[:, 2].sum() == 3
    assert (buckets[0, 0], buckets[-1, 1]) == (0.0, 1.0)


def test_the_end_says_where_the_curves_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = start(tmp_path / "run")
    recorder.log({"validation_metrics/loss": 2.0}, 0)
    recorder.log({"validation_metrics/loss": 1.5}, 10)
    with caplog.at_level(logging.INFO):
        finish_record(recorder, {"validation_metrics/loss": "held-out NLL", "validation_metrics/leak": "leak"})
    assert caplog.messages == [
        "held-out NLL: 2.0000 at step 0, 1.5000 at step 10",
        f"curves: tensorboard --logdir {tmp_path / 'run'}; of all runs beside it, by name: {tmp_path}",
    ]
    assert os.listdir(tmp_path / "run" / "logs") == ["metrics.jsonl"]
