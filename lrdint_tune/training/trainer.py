"""The training loop: one object that builds a run from its config, runs it, and leaves its results behind."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.profiler import record_function
from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

from lrdint_tune.attention import DocumentMask
from lrdint_tune.errors import ConfigError, DataLostError
from lrdint_tune.models.decoder import LlamaDecoder, is_method_tensor
from lrdint_tune.models.hf import check_hf_config, iter_hf_folder, weights_digest
from lrdint_tune.models.spec import ModelSpec
from lrdint_tune.training import startup
from lrdint_tune.training.checkpoint import CheckpointManager, check_same_run
from lrdint_tune.training.compilation import uncompiled
from lrdint_tune.training.components import (
    accumulation_steps,
    bad_row_counts,
    build,
    build_loader,
    build_model,
    build_recorder,
    build_tokenizer,
)
from lrdint_tune.training.config import TrainConfig
from lrdint_tune.training.data import Batch, BatchLoader, raise_everywhere, together
from lrdint_tune.training.flops import training_flops_per_token
from lrdint_tune.training.gradients import diagnostics
from lrdint_tune.training.hardware import device_peak
from lrdint_tune.training.memory import check_device, check_passes
from lrdint_tune.training.metrics import TensorBoardLogger
from lrdint_tune.training.nonfinite import NonFiniteSteps, rows_of
from lrdint_tune.training.parallelize import check_parallel, parallelize
from lrdint_tune.training.precision import check_precision_device, describe_precision
from lrdint_tune.training.profiling import ProfilerWindow
from lrdint_tune.training.progress import Progress, Throughput, memory_values
from lrdint_tune.training.results import write_results
from lrdint_tune.training.schedule import learning_rates, restore_schedule, schedule_state
from lrdint_tune.training.trainable import optimizer_groups, parameter_table, set_trainable
from lrdint_tune.training.updates import build_updates
from lrdint_tune.training.weights import initial_method_state, load_weights, materialise
from lrdint_tune.training.world import World

log = logging.getLogger(__name__)

CALIBRATION_BATCHES = 4


class Trainer:
    """A run: everything that can be refused is refused in the constructor, before any weight is loaded.

    Args:
        cfg: the checked config.
        world: this process among the others.

    Raises:
        ConfigError: for anything in the config, the files or the data that is wrong.
    """

    def __init__(self, cfg: TrainConfig, world: World) -> None:
        self.cfg, self.world = cfg, world
        check_precision_device(cfg, world.device)
        torch.manual_seed(cfg.seed)
        self.output_dir = Path(cfg.output_dir)
        self.checkpoint_dir = Path(cfg.checkpointer["checkpoint_dir"])
        check_device(cfg, world.device)

        # The model first, without memory: a wrong option must not wait for the data to be tokenised.
        model = build_model(cfg)
        check_hf_config(self.checkpoint_dir, self.file_spec(model.spec))
        tokenizer = build_tokenizer(cfg.tokenizer)
        check_parallel(model, cfg, world.device, world.mesh["shard"].size())
        self.accumulation = accumulation_steps(cfg, world.data_size)
        check_passes(cfg, self.accumulation, world.data_size)
        self.global_batch = cfg.batch_size * world.data_size * self.accumulation
        self.loader = build_loader("dataset", cfg.dataset, cfg, world, tokenizer)
        self.loader.check_vocabulary(model.spec.vocab_size)
        self.loader_val = None
        if cfg.dataset_val is not None:
            self.loader_val = build_loader("dataset_val", cfg.dataset_val, cfg, world, tokenizer)
            self.loader_val.check_vocabulary(model.spec.vocab_size)
        steps = self.loader.steps_per_epoch(self.global_batch)
        self.steps_per_epoch = min(steps, cfg.max_steps_per_epoch or steps)
        self.total_steps = self.steps_per_epoch * cfg.epochs

        model = build_model(cfg, total_steps=self.total_steps)
        self.spec = model.spec
        set_trainable(model, cfg.trainable)
        self.base_digest = weights_digest(self.checkpoint_dir)
        startup.check_outputs(model, cfg)
        if world.is_main:
            startup.warn(model.methods(), cfg)
        self.recorder = build_recorder(cfg)
        self.profiler = ProfilerWindow(cfg.profiler, self.recorder.log_dir, world, self.total_steps)

        self.step = 0
        self.nonfinite = NonFiniteSteps(cfg)
        self.continues_method = False  # until the weights show that they hold the method's tensors
        self.checkpoints = CheckpointManager(
            self.output_dir / "checkpoints", keep_last_n=cfg.keep_last_n_checkpoints, is_main=world.is_main
        )
        # One rank looks: on a network file system two ranks may see two different latest checkpoints.
        world.on_main(self.checkpoints.check_writable)
        world.on_main(self.recorder.check)
        world.on_main(self.checkpoints.recover)
        if cfg.resume != "auto" and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and world.is_main:
            log.warning("resume=%s: a restart by torchrun begins there again; auto goes on from the latest", cfg.resume)
        resume_from, saved = world.on_main(self._find_checkpoint)
        if world.is_main:
            log.info("%s, method %s\n%s", cfg.model["_component_"], self.spec.method, parameter_table(model))
            for line in describe_precision(model, cfg):
                log.info(line)

        self.model = self._load_model(model)
        self.optimizer = build("optimizer", cfg.optimizer, optimizer_groups(self.model, lam_lr=cfg.lam_lr))
        self.scheduler = (
            None
            if cfg.lr_scheduler is None
            else build("lr_scheduler", cfg.lr_scheduler, self.optimizer, num_training_steps=self.total_steps)
        )
        self.updates = build_updates(self.model, self.optimizer, world, cfg)
        if resume_from is not None and saved is not None:
            self._resume(resume_from, saved)
        elif self.model.needs_calibration:
            if self.continues_method:
                log.info("not calibrated: the heads are those of checkpointer.checkpoint_dir")
            else:
                self._calibrate()
        self.checkpoints.dry_run(self.model, self.optimizer, self.train_state())

    # ------------------------------------------------------------------ building

    def file_spec(self, spec: ModelSpec) -> ModelSpec:
        """The model as the pretrained files know it: with ``untie_lm_head`` their head is still the embedding
        matrix."""
        return dataclasses.replace(spec, tie_word_embeddings=True) if self.cfg.untie_lm_head else spec

    def _load_model(self, model: LlamaDecoder) -> LlamaDecoder:
        new_tensors = initial_method_state(model, self.cfg.seed)
        parallelize(model, self.cfg, self.world)
        materialise(model, self.world.device, cpu_offload=self.cfg.fsdp_cpu_offload)
        load_weights(model, self._weights(new_tensors))
        return model

    def _weights(self, new_tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        yield from new_tensors.items()
        # After the start values: a folder of this project brings the method's trained tensors along.
        for name, tensor in iter_hf_folder(self.checkpoint_dir, self.file_spec(self.spec)):
            self.continues_method |= is_method_tensor(name)
            yield name, tensor
            if self.cfg.untie_lm_head and name == "tok_embeddings.weight":
                yield "output.weight", tensor

    def _calibrate(self) -> None:
        """Show the methods the first global batches, however they are spread over ranks; training starts with the same
        ones again."""
        count = min(self.cfg.calibration_batches or CALIBRATION_BATCHES, self.steps_per_epoch)
        self.loader.start_epoch(0)
        taken = (self.loader.next_batch() for _ in range(count * self.accumulation))
        batches = (self._inputs(self.loader, batch, mask_padding=True) for batch in together(taken, self.world.device))
        with uncompiled(self.model):
            self.model.calibrate(batches, reduce=dist.all_reduce)
        if self.world.is_main:
            log.info("calibrated on the first %d global batches", count)

    # ------------------------------------------------------------------ state

    def _find_checkpoint(self) -> tuple[Path | None, dict[str, Any] | None]:
        path = self.checkpoints.find(self.cfg.resume)
        if path is None:
            return None, None
        saved = self.checkpoints.read_state(path)
        check_same_run(saved["run"], self.run_identity(), path)
        return path, saved

    def run_identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued."""
        spec = dataclasses.asdict(self.spec)
        options = spec.pop("method_options")
        if not spec["adapters"]:  # a checkpoint from before there were any goes on
            del spec["adapters"]
        if self.cfg.quantize_base != "none":  # other weights than those of the folder
            spec["quantize_base"] = self.cfg.quantize_base
        return {
            **spec,
            **options,
            "trainable": sorted(self.cfg.trainable),
            "global_batch_size": self.global_batch,
            "max_seq_len": self.cfg.max_seq_len,
            "seed": self.cfg.seed,
            "steps_per_epoch": self.steps_per_epoch,
            "optimizer": self.cfg.optimizer["_component_"],
            "lr_scheduler": None if self.cfg.lr_scheduler is None else self.cfg.lr_scheduler["_component_"],
            "checkpoint_dir weights": self.base_digest,
        }

    def train_state(self) -> dict[str, Any]:
        """The JSON part of a checkpoint."""
        return {
            "step": self.step,
            "run": self.run_identity(),
            "leaks_future": self.spec.leaks_future,
            "skipped_steps": self.nonfinite.skipped,
            "loader": self.loader.state_dict(),
            "lr_scheduler": None if self.scheduler is None else schedule_state(self.scheduler),
        }

    def _resume(self, path: Path, saved: dict[str, Any]) -> None:
        self.checkpoints.load(path, self.model, self.optimizer)
        self.step = saved["step"]
        self.nonfinite.skipped = saved.get("skipped_steps", 0)  # a checkpoint from before there were any goes on
        self.loader.load_state_dict(saved["loader"])
        if self.scheduler is not None and saved["lr_scheduler"] is not None:
            if not restore_schedule(self.scheduler, saved["lr_scheduler"]):
                log.warning(
                    "optimizer.lr, lam_lr: no effect, the schedule goes on with the checkpoint's learning rates %s",
                    saved["lr_scheduler"]["base_lrs"],
                )
        self.checkpoints.load_rng(path)
        if self.world.is_main:
            log.info("resuming from %s", path)

    def save(self) -> None:
        self.checkpoints.save(self.step, self.model, self.optimizer, self.train_state())

    # ------------------------------------------------------------------ the loop

    def train(self) -> None:
        """Run to the last step, with validation and checkpoints on the way, then export.

        Raises:
            NonFiniteLossError: NaN or infinite loss or gradient; nothing was updated with it (with ``optimizer_in_bwd``
            the parameters in memory were), the last checkpoint stands.
            DataLostError: a rank cannot read its data any more; the last finished step is saved.
        """
        cfg = self.cfg
        self.world.on_main(lambda: self.checkpoints.set_aside_after(self.step))
        recorder = self._open_recorder()
        progress = Progress(self.total_steps, self.step, enabled=self.world.is_main)
        throughput = Throughput(
            flops_per_token=training_flops_per_token(self.model, cfg.max_seq_len),
            causal_flops_per_token=training_flops_per_token(self.model, cfg.max_seq_len, causal=True),
            world_size=self.world.size,
            peak_tflops=cfg.peak_tflops or device_peak(self.world.device, cfg.dtype),
        )
        tps = 0.0
        try:
            if self.step == 0 and self.loader_val is not None:
                self._record_validation(recorder, progress)
            throughput.reset()
            self.profiler.start(self.total_steps - self.step)
            while self.step < self.total_steps:
                logging_step = (self.step + 1) % cfg.log_every_n_steps == 0
                values, tokens, data_seconds = self._train_step(logging_step)
                throughput.add(tokens, data_seconds)
                if logging_step:
                    rates = throughput.take()
                    tps = rates["throughput(tps)"]
                    if recorder is not None:
                        recorder.log({**values, **rates, **memory_values(self.world.device)}, self.step)
                progress.update(values["loss_metrics/global_avg_loss"], tps)
                last = self.step == self.total_steps
                if self.loader_val is not None and (
                    last or (cfg.run_val_every_n_steps and self.step % cfg.run_val_every_n_steps == 0)
                ):
                    self._record_validation(recorder, progress)
                    throughput.reset()
                if last or (cfg.save_every_n_steps and self.step % cfg.save_every_n_steps == 0):
                    self.save()
                    throughput.reset()
                self.profiler.step()
        except DataLostError:
            if self.step and not self.world.on_main(lambda: self.step in self.checkpoints.steps()):
                self.save()
            raise
        finally:
            self.profiler.stop()
            progress.close()
            if recorder is not None:
                recorder.close()
        self.export()
        if recorder is not None:
            self._report(recorder)

    def _train_step(self, logging_step: bool) -> tuple[dict[str, float], float, float]:
        """One optimizer step; returns its scalars, its input tokens over all ranks and the seconds spent waiting for
        data."""
        start = time.perf_counter()
        before = self.loader.epoch, self.loader.position
        if self.step % self.steps_per_epoch == 0:
            self.loader.start_epoch(self.step // self.steps_per_epoch)
        with record_function("data"):
            batches, lost = self._take_batches()
        data_seconds = time.perf_counter() - start

        self.model.advance_schedule(self.step)
        self.model.enable_diagnostics(logging_step)
        counts = torch.tensor(
            [sum(b.num_label_tokens for b in batches), sum(b.num_input_tokens for b in batches), lost is not None],
            dtype=torch.float64,
            device=self.world.device,
        )
        dist.all_reduce(counts)
        label_tokens, input_tokens, any_lost = counts.tolist()
        if any_lost:  # the step is not made, so its data are the next one's
            self.loader.epoch, self.loader.position = before
            raise_everywhere(lost)
        copies = self.world.size // self.world.data_size  # ranks that share a sequence or a layer count the same batch
        label_tokens, input_tokens = label_tokens / copies, input_tokens / copies
        if not label_tokens:
            raise ConfigError(
                f"dataset: no trained token in the batch of step {self.step + 1} (rows {rows_of(batches)}); check the "
                "columns"
            )

        losses = []
        for i, batch in enumerate(batches):
            # Between the passes of a step each rank adds up its own gradients; they travel once.
            cast(FSDPModule, self.model).set_requires_gradient_sync(i == len(batches) - 1)
            with record_function("forward"):
                loss = self._loss(self.loader, batch)
            with record_function("backward"):
                # FSDP2 averages gradients over the ranks that hold parts of the loss; it is per token over all of them.
                (loss * (self.world.size // self.world.tensor_size / label_tokens)).backward()
            losses.append(loss.detach())
        loss = torch.stack(losses).sum().double()
        dist.all_reduce(loss)
        average = loss.item() / self.world.tensor_size / label_tokens
        norm = self.updates.total_norm()
        finite = math.isfinite(average) and math.isfinite(norm)
        if not finite:
            self.nonfinite.skip(
                self.step + 1, average, norm, batches, losses, self.updates.if_nonfinite, self.checkpoints.steps()
            )

        values = {"loss_metrics/global_avg_loss": average, **self.nonfinite.metrics()}
        if logging_step:
            values |= {"grad_norm": norm, **learning_rates(self.optimizer), **diagnostics(self.model, self.world)}
            if not self.spec.is_stock:
                values |= self.updates.adapter_norms()
        if finite:
            self.updates.finish(norm)
        else:
            self.optimizer.zero_grad(set_to_none=True)
        if self.cfg.fp8_all_gather:
            precompute_float8_dynamic_scale_for_fsdp(self.model)  # one all-reduce instead of one for each weight
        if self.scheduler is not None:
            self.scheduler.step()
        self.step += 1
        self.model.advance_schedule(self.step)
        return values, input_tokens, data_seconds

    def _take_batches(self) -> tuple[list[Batch], DataLostError | None]:
        """This rank's batches of a step, or those that were there and why the next one is not."""
        batches: list[Batch] = []
        try:
            for _ in range(self.accumulation):
                batches.append(self.loader.next_batch())
        except DataLostError as error:
            return batches, error
        return batches, None

    def _loss(self, loader: BatchLoader, batch: Batch) -> Tensor:
        """Sum of the token losses of a micro-batch."""
        needs_ends = any(method.needs_document_ends for method in self.model.methods())
        return self.model(**self._inputs(loader, batch, mask_padding=needs_ends))

    def _inputs(self, loader: BatchLoader, batch: Batch, *, mask_padding: bool) -> dict[str, Any]:
        """The model's arguments for a micro-batch."""
        # Unpacked rows mostly need no mask: nothing before the padding on their right can see it.
        mask: DocumentMask | Tensor | None = DocumentMask(batch.lengths) if loader.packed else None
        if mask_padding:
            mask = batch.dense_mask().to(self.world.device)
        tokens, labels, input_pos = (t.to(self.world.device) for t in (batch.tokens, batch.labels, batch.input_pos))
        return {"tokens": tokens, "mask": mask, "input_pos": input_pos, "labels": labels}

    @torch.no_grad()
    def validate(self) -> float:
        """NLL per trained token over ``dataset_val``, in nats, teacher-forced."""
        assert self.loader_val is not None
        total = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        self.model.enable_diagnostics(False)
        self.model.eval()  # the adapters' dropout
        for batch in together(self.loader_val.epoch_batches(), self.world.device):
            total[0] += self._loss(self.loader_val, batch).double()
            total[1] += batch.num_label_tokens / self.world.context_size
        self.model.train()
        dist.all_reduce(total)
        return float(total[0] / total[1])

    def _record_validation(self, recorder: TensorBoardLogger | None, progress: Progress) -> None:
        nll = self.validate()
        progress.message(f"step {self.step}: held-out NLL {nll:.4f} nats per token")
        if recorder is not None:
            recorder.log({"validation_metrics/loss": nll}, self.step)

    @staticmethod
    def _report(recorder: TensorBoardLogger) -> None:
        validations = recorder.history("validation_metrics/loss")
        if validations:
            (first, before), (last, after) = validations[0], validations[-1]
            log.info("held-out NLL per token: %.4f at step %d, %.4f at step %d", before, first, after, last)
        log.info("curves: tensorboard --logdir %s", recorder.log_dir)

    def _open_recorder(self) -> TensorBoardLogger | None:
        if not self.world.is_main:
            return None
        self.recorder.open(resumed_step=self.step)
        if self.step == 0:
            self.recorder.log_text("config", f"```yaml\n{OmegaConf.to_yaml(dataclasses.asdict(self.cfg))}\n```")
            if skipped := bad_row_counts(self.cfg, self.loader, self.loader_val):
                self.recorder.log(skipped, 0)
        return self.recorder

    # ------------------------------------------------------------------ results

    def export(self) -> None:
        """Write ``output_dir/adapter`` and ``output_dir/hf``. A leaking model is kept as a checkpoint only."""
        if self.spec.leaks_future:
            log.warning(
                "integral=sequence: nothing exported, the model reads future tokens; its checkpoint is in %s",
                self.checkpoints.folder,
            )
            return
        write_results(self.model, self.cfg)
