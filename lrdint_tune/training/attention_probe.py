"""A look at the model's attention on a fixed text, every few steps of a run."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.attention_maps import STATISTICS, LayerStatistics
from lrdint_tune.evaluation.attention_record import RUN_FILE, as_record, look, step_files
from lrdint_tune.evaluation.heat_map import pixels
from lrdint_tune.evaluation.probe_text import probe_tokens
from lrdint_tune.evaluation.report import report_of_run, write_report
from lrdint_tune.export.atomic import atomic_text
from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.training.compilation import uncompiled
from lrdint_tune.training.config import TrainConfig
from lrdint_tune.training.metrics import TensorBoardLogger
from lrdint_tune.training.probe_options import ProbeOptions
from lrdint_tune.training.world import World

log = logging.getLogger(__name__)


class AttentionProbe:
    """Records statistics of the attention maps of a model in training: curves, histograms and heat maps in TensorBoard,
    all numbers in ``output_dir/attention/step-N.json``.

    Args:
        cfg: with an ``attention_probe`` section.
        options: its keys.
        tokens: int64 ``[1, N]``, the text, on the model's device.
        world: this process among the others.
        metrics_file: where the run's curves are, for the report.
    """

    def __init__(
        self, cfg: TrainConfig, options: ProbeOptions, tokens: Tensor, world: World, metrics_file: Path
    ) -> None:
        self.cfg, self.options, self.tokens, self.world = cfg, options, tokens, world
        self.output_dir = Path(cfg.output_dir)
        self.folder = self.output_dir / "attention"
        self.metrics_file = metrics_file

    def start(self, step: int) -> None:
        """On the main process, before the first look: keep what the report will want to know of the run. Removes what
        is recorded after ``step``, as TensorBoardLogger does; a new run removes all records of an earlier one."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for recorded, file in step_files(self.folder).items():
                if step == 0 or recorded > step:
                    file.unlink()
            metrics = os.path.relpath(self.metrics_file, self.folder)
            atomic_text(
                self.folder / RUN_FILE, json.dumps({"config": dataclasses.asdict(self.cfg), "metrics": metrics})
            )
        except OSError as error:
            log.warning("%s: cannot be written (%s); the report will miss it", self.folder, error.strerror or error)

    def is_due(self, step: int, last_step: int) -> bool:
        return step % self.options.every_n_steps == 0 or step == last_step

    def is_missing(self, step: int, last_step: int) -> bool:
        """Whether the start of the run has one to make; every rank must ask."""
        return self.is_due(step, last_step) and not self.world.on_main(lambda: step in step_files(self.folder))

    def record(self, model: LlamaDecoder, step: int, recorder: TensorBoardLogger | None) -> None:
        """Look, on all ranks; the one with a recorder writes."""
        with uncompiled(model):
            layers = look(model, self.tokens, top_k=self.options.top_k, heads_shown=self.options.heads_shown)
        if recorder is None:
            return
        file = self.folder / f"step-{step}.json"
        facts = {"step": step, "num_tokens": self.tokens.shape[1], "top_k": self.options.top_k}
        try:
            atomic_text(file, json.dumps(as_record(model, layers, **facts)))
        except OSError as error:
            log.warning("%s: cannot be written (%s); the run goes on without it", file, error.strerror or error)
        recorder.log(scalars(layers), step)
        values = {f"attention/{name}": torch.cat([layer.effective[name] for layer in layers]) for name in STATISTICS}
        recorder.log_histograms({tag: of_heads for tag, of_heads in values.items() if of_heads.isfinite().any()}, step)
        recorder.log_images(
            {
                f"attention/layers.{i}/head.{head}": pixels(weights)
                for i, layer in enumerate(layers)
                for head, weights in layer.heat_maps.items()
            },
            step,
        )

    def report(self) -> None:
        """Write ``output_dir/report.html``, on the main process."""
        file = self.output_dir / "report.html"
        try:
            write_report(report_of_run(self.output_dir), file)
        except (OSError, ConfigError) as error:  # no reason for a finished run to fail
            log.warning("%s: not written (%s)", file, error)
        else:
            log.info("attention before and after: %s", file)


def build_probe(
    cfg: TrainConfig, model: LlamaDecoder, tokenizer: Any, world: World, metrics_file: Path
) -> AttentionProbe | None:
    """The probe of a config that has one.

    Raises:
        ConfigError: the text cannot be read, or is longer than the model's sequences.
    """
    options = cfg.probe_options
    if options is None:
        return None
    limit = model.spec.max_seq_len
    if options.max_tokens > limit:
        raise ConfigError(f"attention_probe.max_tokens={options.max_tokens}: the model takes {limit} tokens; lower it")
    tokens = probe_tokens(tokenizer, max_tokens=options.max_tokens, text_file=options.text_file)
    return AttentionProbe(cfg, options, tokens.to(world.device), world, metrics_file)


def scalars(layers: list[LayerStatistics]) -> dict[str, float]:
    """Of the effective maps, the mean over heads: ``attention/{statistic}/layers.{i}``."""
    return {
        f"attention/{name}/layers.{i}": layer.effective[name].mean().item()
        for i, layer in enumerate(layers)
        for name in STATISTICS
    }
