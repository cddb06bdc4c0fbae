"""Fine-tune a ``transformers`` GPT-2, Llama or RoBERTa classifier with a method, on one process.

    tune run lrdint_tune/finetune_transformers --config configs/gpt2_daa.yaml

Weights are float32; ``dtype: bf16`` computes under autocast. Held-out loss before and after, TensorBoard's curves in
``output_dir`` and the same numbers in ``output_dir/logs/metrics.jsonl``, and in ``output_dir/adapter`` everything that
was trained: ``lrdint_tune.hosts.load`` puts it into the pretrained model again.

What it does not do: several processes (no FSDP), checkpoints and resuming, activation checkpointing,
sequence-to-sequence models, pairs of texts. Llamas of any size train with ``lrdint_tune/full_finetune_distributed``.

Exit codes: 0 done, 2 bad input, 3 NaN or infinite loss.
"""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel

from lrdint_tune.attention import method_options
from lrdint_tune.entry import recipe
from lrdint_tune.errors import ConfigError
from lrdint_tune.exit_codes import DONE
from lrdint_tune.hosts.attach import attached
from lrdint_tune.hosts.config import HostConfig
from lrdint_tune.hosts.data import LabelledBatch, LabelledLoader, LabelledTexts
from lrdint_tune.hosts.model import (
    advance_schedule,
    calibrate,
    diagnostics,
    enable_diagnostics,
    max_length,
    methods,
    set_trainable,
    state_of,
)
from lrdint_tune.hosts.saving import check_folder, save
from lrdint_tune.training import startup
from lrdint_tune.training.components import bad_row_counts, build, build_recorder, build_tokenizer
from lrdint_tune.training.config import Section, load_config
from lrdint_tune.training.data import IGNORE_INDEX, Batch, BatchLoader, TokenisedDataset
from lrdint_tune.training.hparams import hyperparameters
from lrdint_tune.training.nonfinite import NonFiniteLossError
from lrdint_tune.training.progress import Progress
from lrdint_tune.training.recording import finish_record, start_record
from lrdint_tune.training.trainable import optimizer_groups
from lrdint_tune.training.trainer import CALIBRATION_BATCHES
from lrdint_tune.training.world import resolve_device

log = logging.getLogger(__name__)


class Finetuning:
    """A run. Everything that can be refused is refused in the constructor, and most before any weight is loaded.

    Raises:
        ConfigError: for anything in the config, the files or the data that is wrong.
    """

    def __init__(self, cfg: HostConfig) -> None:
        self.cfg = cfg
        self.device = resolve_device(cfg.device)
        self.folder = Path(cfg.output_dir) / "adapter"
        check_folder(self.folder)
        model = self._build(weights=False)
        set_trainable(model, cfg.trainable)
        self.task = state_of(model).architecture.task
        if self.task == "seq2seq":
            raise ConfigError(
                f"model.architecture={type(model).__name__!r}: this recipe trains causal models and classifiers; use "
                "lrdint_tune.hosts.attach in a loop of your own"
            )
        if cfg.max_seq_len > max_length(model):
            raise ConfigError(f"max_seq_len={cfg.max_seq_len}: the model's limit is {max_length(model)}; lower it")
        startup.warn(methods(model), cfg)
        tokenizer = build_tokenizer(cfg.tokenizer)
        self.loader = self._loader("dataset", cfg.dataset, tokenizer, model)
        self.loader_val = None
        if cfg.dataset_val is not None:
            self.loader_val = self._loader("dataset_val", cfg.dataset_val, tokenizer, model)
        steps = self.loader.steps_per_epoch(cfg.batch_size * cfg.accumulation)
        self.steps_per_epoch = min(steps, cfg.max_steps_per_epoch or steps)
        self.total_steps = self.steps_per_epoch * cfg.epochs
        self.recorder = build_recorder(cfg)
        self.recorder.check()

        torch.manual_seed(cfg.seed)
        self.model = self._build(weights=True).to(self.device)  # type: ignore[arg-type]  # a decorated nn.Module.to
        set_trainable(self.model, cfg.trainable)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build("optimizer", cfg.optimizer, optimizer_groups(self.model, lam_lr=cfg.lam_lr))
        self.scheduler = None
        if cfg.lr_scheduler is not None:
            self.scheduler = build(
                "lr_scheduler", cfg.lr_scheduler, self.optimizer, num_training_steps=self.total_steps
            )
        trained, every = (sum(p.numel() for p in some) for some in (self.trained, self.model.parameters()))
        self.parameters = f"{trained:,} parameters trained of {every:,}"
        log.info("%s, method %s: %s", type(self.model).__name__, state_of(self.model).method, self.parameters)

    def _build(self, *, weights: bool) -> PreTrainedModel:
        """The model; with ``weights`` False without memory. ``anneal_steps`` defaults to half of the run."""
        section = dict(self.cfg.model)
        options = method_options(section.get("method", "none"))
        if weights and section.get("lam", options.get("lam")) == "annealed" and section.get("anneal_steps") is None:
            section["anneal_steps"] = max(1, self.total_steps // 2)
        model = build("model", section, self.cfg.checkpointer["checkpoint_dir"], weights=weights)
        if not isinstance(model, PreTrainedModel) or attached(model) is None:
            raise ConfigError(f"model._component_={section['_component_']!r}: use lrdint_tune.hosts.from_pretrained")
        return model

    def _loader(self, key: str, section: Section, tokenizer: Any, model: Any) -> BatchLoader | LabelledLoader:
        cfg, training = self.cfg, key == "dataset"
        packed = section.get("packed", False)
        if not isinstance(packed, bool) or (packed and self.task == "classification"):
            raise ConfigError(f"{key}.packed={packed!r}: must be true or false, and false for classification")
        options = {name: value for name, value in section.items() if name != "packed"}
        dataset = build(key, options, tokenizer, max_seq_len=cfg.max_seq_len)
        common: dict[str, Any] = {
            "batch_size": cfg.batch_size if training else cfg.batch_size_val or cfg.batch_size,
            "shuffle": training and cfg.shuffle,
            "seed": cfg.seed,
            "drop_last": training,
        }
        if self.task == "classification" and isinstance(dataset, LabelledTexts):
            dataset.check(vocab_size=model.config.vocab_size, num_labels=model.config.num_labels)
            return LabelledLoader(dataset, pad_id=model.config.pad_token_id or 0, **common)
        if self.task == "lm" and isinstance(dataset, TokenisedDataset):
            dataset.check_vocabulary(model.config.vocab_size)
            return BatchLoader(
                dataset, dp_rank=0, dp_size=1, max_seq_len=cfg.max_seq_len, packed=packed, pad_id=0, **common
            )
        fitting = "lrdint_tune.hosts.data.classification_dataset" if self.task == "classification" else "text_dataset"
        raise ConfigError(f"{key}._component_={section['_component_']!r}: does not fit the model; use {fitting}")

    def train(self) -> None:
        """Train, with a validation before and after, and save.

        Raises:
            NonFiniteLossError: NaN or infinite loss or gradient; nothing was updated with it, nothing is saved.
        """
        cfg, recorder = self.cfg, self.recorder
        batch, options = cfg.batch_size * cfg.accumulation, state_of(self.model).options
        start_record(
            recorder,
            cfg,
            hyperparameters(cfg, options, global_batch_size=batch, steps=self.total_steps),
            parameters=self.parameters,
            counts=bad_row_counts(cfg, self.loader, self.loader_val),
            resumed_step=0,
        )
        progress = Progress(self.total_steps, 0, enabled=True)
        try:
            self._calibrate()
            self._validate(0)
            self.model.train()
            for step in range(self.total_steps):
                logging_step = (step + 1) % cfg.log_every_n_steps == 0
                enable_diagnostics(self.model, logging_step)
                values = self._train_step(step)
                if logging_step:
                    recorder.log({**values, **diagnostics(self.model)}, step + 1)
                progress.update(values["loss_metrics/global_avg_loss"], 0.0)
            self._validate(self.total_steps)
        finally:
            progress.close()
            recorder.close()
        save(self.model, self.folder)
        log.info("saved %s", self.folder)
        finish_record(recorder, {f"validation_metrics/{name}": f"held-out {name}" for name in ("loss", "accuracy")})

    def _train_step(self, step: int) -> dict[str, float]:
        if step % self.steps_per_epoch == 0:
            self.loader.start_epoch(step // self.steps_per_epoch)
        batches = [self.loader.next_batch() for _ in range(self.cfg.accumulation)]
        count = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)
        advance_schedule(self.model, step)
        total = 0.0
        for batch in batches:
            loss, _ = self._loss(self.loader, batch)
            (loss / count).backward()
            total += loss.item()
        clip = self.cfg.clip_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.trained, clip).item()
        if not math.isfinite(total) or not math.isfinite(norm):
            rows = sorted({row for batch in batches for row in batch.row_ids})
            raise NonFiniteLossError(
                f"step {step + 1}: loss {total / count}, gradient norm {norm}; rows {rows[:20]}; nothing was updated"
            )
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        advance_schedule(self.model, step + 1)
        return {"loss_metrics/global_avg_loss": total / count, "grad_norm": norm, "lr": lr}

    def _inputs(self, loader: Any, batch: Batch | LabelledBatch) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": batch.tokens.to(self.device)}
        if isinstance(batch, LabelledBatch):
            return {**inputs, "attention_mask": batch.mask.to(self.device)}
        inputs["use_cache"] = False
        if loader.packed:  # transformers takes positions that restart for the boundaries of documents
            inputs["position_ids"] = batch.input_pos.to(self.device)
        return inputs

    def _loss(self, loader: Any, batch: Batch | LabelledBatch) -> tuple[Tensor, Tensor]:
        """The sum of the losses of a micro-batch, and how many labels were predicted right."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.cfg.dtype == "bf16"):
            logits = self.model(**self._inputs(loader, batch)).logits
        labels = batch.labels.to(self.device).flatten()
        logits = logits.float().view(len(labels), -1)
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        return loss, (logits.argmax(-1) == labels).sum()

    def _calibrate(self) -> None:
        count = min(self.cfg.calibration_batches or CALIBRATION_BATCHES, self.steps_per_epoch * self.cfg.accumulation)
        self.loader.start_epoch(0)
        calibrate(self.model, (self._inputs(self.loader, self.loader.next_batch()) for _ in range(count)))

    @torch.no_grad()
    def _validate(self, step: int) -> None:
        """Record the mean loss per label over ``dataset_val`` in nats, and the share predicted right."""
        if self.loader_val is None:
            return
        self.model.eval()
        enable_diagnostics(self.model, False)
        loss, hits, count = 0.0, 0, 0
        for batch in self.loader_val.epoch_batches():
            batch_loss, right = self._loss(self.loader_val, batch)
            loss, hits = loss + batch_loss.item(), hits + int(right)
            count += int((batch.labels != IGNORE_INDEX).sum())
        self.recorder.log({"validation_metrics/loss": loss / count, "validation_metrics/accuracy": hits / count}, step)


@recipe()
def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe from a config file and ``key=value`` overrides; returns the process's exit code."""
    Finetuning(load_config(cfg, HostConfig)).train()
    return DONE


if __name__ == "__main__":
    sys.exit(recipe_main())
