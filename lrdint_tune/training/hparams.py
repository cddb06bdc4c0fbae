"""TensorBoard's hyperparameter tab: one row a run, what it was given beside what it reached."""

from __future__ import annotations

import time
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

from lrdint_tune.attention import METHODS, method_options
from lrdint_tune.training.config import RunConfig

# The columns shown at first; the others are a click away.
SHOWN = ("lam", "lr", "method", "rank", "trainable")
NUMBERS = ("rank", "lr", "lam_lr", "lam_init", "anneal_steps", "seed", "max_seq_len", "global_batch_size", "steps")
TEXTS = ("method", "trainable", "adapters", "checkpoint_dir", "dtype")
RESULTS = {
    "validation_metrics/loss": "held-out NLL",
    "loss_metrics/global_avg_loss": "training loss",
    "validation_metrics/prefix_wise_loss": "held-out NLL, prefix-wise",
    "validation_metrics/leak": "leak",
    "throughput/tokens_per_second": "tokens/s",
}


def columns() -> list[str]:
    """Every column of the table. The same for all runs: TensorBoard takes them from whichever run it meets first."""
    options = (name for method in METHODS for name in method_options(method))
    return list(dict.fromkeys((*NUMBERS, *TEXTS, *options)))


def hyperparameters(
    cfg: RunConfig, options: dict[str, Any], *, global_batch_size: int, steps: int
) -> dict[str, float | str]:
    """The row of a run: column -> value; what the run has not or leaves to a default of null is left out.

    Args:
        options: of the method, defaults filled in.
        global_batch_size: sequences of an optimizer step.
        steps: optimizer steps of the whole run.
    """
    given = {
        **options,
        "method": cfg.model.get("method", "none"),
        "trainable": "+".join(cfg.trainable),
        "adapters": "+".join(str(entry["type"]) for entry in cfg.model.get("adapters") or []) or None,
        "checkpoint_dir": cfg.checkpointer["checkpoint_dir"],
        "lr": cfg.optimizer.get("lr"),
        "global_batch_size": global_batch_size,
        "steps": steps,
        **{key: getattr(cfg, key) for key in ("lam_lr", "seed", "max_seq_len", "dtype")},
    }
    return {name: float(value) if name in NUMBERS else str(value) for name, value in given.items() if value is not None}


def table_summary() -> Summary:
    """The table's columns, hyperparameters and results."""
    infos = [
        api_pb2.HParamInfo(
            name=name,
            type=api_pb2.DATA_TYPE_FLOAT64 if name in NUMBERS else api_pb2.DATA_TYPE_STRING,
            differs=name in SHOWN,  # these come first, and TensorBoard shows the first five
        )
        for name in columns()
    ]
    results = [
        api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=title) for tag, title in RESULTS.items()
    ]
    experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=results, time_created_secs=time.time())
    return _summary(metadata.EXPERIMENT_TAG, HParamsPluginData(experiment=experiment))


def start_summary(values: dict[str, float | str]) -> Summary:
    """A run's row, from :func:`hyperparameters`. Its results are the latest of the run's curves, also while it goes."""
    info = SessionStartInfo(start_time_secs=time.time())
    for name, value in values.items():
        if isinstance(value, str):
            info.hparams[name].string_value = value
        else:
            info.hparams[name].number_value = value
    return _summary(metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=info))


def end_summary() -> Summary:
    """That the run came to its end."""
    info = SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    return _summary(metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=info))


def _summary(tag: str, data: HParamsPluginData) -> Summary:
    value = Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR)
    return Summary(value=[value])
