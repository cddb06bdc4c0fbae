"""What a record holds beside the curves: the config, the parameter table, the hyperparameters, the charts' layout."""

from __future__ import annotations

import dataclasses
import logging

from omegaconf import OmegaConf

from lrdint_tune.training.charts import charts_of, layout_summary
from lrdint_tune.training.config import RunConfig
from lrdint_tune.training.hparams import end_summary, start_summary, table_summary
from lrdint_tune.training.metrics import TensorBoardLogger

log = logging.getLogger(__name__)


def start_record(
    recorder: TensorBoardLogger,
    cfg: RunConfig,
    hparams: dict[str, float | str],
    *,
    parameters: str,
    counts: dict[str, float],
    resumed_step: int,
) -> None:
    """Open the record. A resumed run that finds its earlier record there goes on with that.

    Args:
        hparams: from :func:`~lrdint_tune.training.hparams.hyperparameters`.
        parameters: a table of what is trained, as plain text.
        counts: scalars that are known before the first step.
        resumed_step: optimizer steps done; 0 for a new run.
    """
    recorder.open(resumed_step=resumed_step)
    if recorder.continues:
        return
    recorder.log_text("config", f"```yaml\n{OmegaConf.to_yaml(dataclasses.asdict(cfg))}\n```")
    recorder.log_text("parameters", f"```\n{parameters}\n```")
    recorder.log_summary(table_summary())
    recorder.log_summary(start_summary(hparams))
    recorder.log_summary(layout_summary(charts_of(cfg)))
    if counts:
        recorder.log(counts, resumed_step)


def finish_record(recorder: TensorBoardLogger, reported: dict[str, str]) -> None:
    """Mark the run as finished, and tell what it reached and where its curves are.

    Args:
        reported: tag -> name of the curves whose first and last value are told.
    """
    recorder.log_summary(end_summary())
    for tag, name in reported.items():
        if values := recorder.history(tag):
            (first, before), (last, after) = values[0], values[-1]
            log.info("%s: %.4f at step %d, %.4f at step %d", name, before, first, after, last)
    folder = recorder.events_dir
    log.info("curves: tensorboard --logdir %s; of all runs beside it, by name: %s", folder, folder.absolute().parent)
