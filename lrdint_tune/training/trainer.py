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
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.profiler import record_function
from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

from lrdint_tune.errors import ConfigError, DataLostError
from lrdint_tune.models.decoder import LlamaDecoder, is_method_tensor
from lrdint_tune.models.hf import check_hf_config, weights_digest
from lrdint_tune.training import startup
from lrdint_tune.training.attention_probe import build_probe
from lrdint_tune.training.checkpoint import CheckpointManager
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
from lrdint_tune.training.forward import model_inputs, summed_loss
from lrdint_tune.training.gradients import diagnostics
from lrdint_tune.training.hardware import device_peak
from lrdint_tune.training.hparams import hyperparameters
from lrdint_tune.training.identity import check_same_run, run_identity
from lrdint_tune.training.interruption import Interruption, Stopped, stop_if_any
from lrdint_tune.training.memory import check_device, check_passes
from lrdint_tune.training.metrics import TensorBoardLogger
from lrdint_tune.training.nonfinite import NonFiniteSteps, rows_of
from lrdint_tune.training.parallelize import check_parallel, parallelize
from lrdint_tune.training.precision import check_precision_device, describe_precision
from lrdint_tune.training.profiling import ProfilerWindow
from lrdint_tune.training.progress import Progress, Throughput, memory_values
from lrdint_tune.training.pulse import Pulse, agreed
from lrdint_tune.training.recording import finish_record, start_record
from lrdint_tune.training.results import write_results
from lrdint_tune.training.schedule import learning_rates, restore_schedule, schedule_state
from lrdint_tune.training.trainable import optimizer_groups, parameter_table, set_trainable
from lrdint_tune.training.updates import build_updates
from lrdint_tune.training.validation import held_out_nll, leak_values
from lrdint_tune.training.weights import file_spec, initial_method_state, load_weights, materialise, pretrained_tensors
from lrdint_tune.training.world import World

log = logging.getLogger(__name__)

CALIBRATION_BATCHES = 4


class Trainer:
    """A run: everything that can be refused is refused in the constructor, before any weight is loaded.

    Args:
        cfg: the checked config.
        world: this process among the others.
        interruption: the signals to listen to; without it there are none.
        pulse: told what is being done, for those who watch.

    Raises:
        ConfigError: for anything in the config, the files or the data that is wrong.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        world: World,
        *,
        interruption: Interruption | None = None,
        pulse: Pulse | None = None,
    ) -> None:
        self.cfg, self.world = cfg, world
        self.interruption, self.pulse = interruption or Interruption(), pulse or Pulse()
        check_precision_device(cfg, world.device)
        torch.manual_seed(cfg.seed)
        self.output_dir = Path(cfg.output_dir)
        self.checkpoint_dir = Path(cfg.checkpointer["checkpoint_dir"])
        check_device(cfg, world.device)

        # The model first, without memory: a wrong option must not wait for the data to be tokenised.
        model = build_model(cfg)
        check_hf_config(self.checkpoint_dir, file_spec(model.spec, untie_lm_head=cfg.untie_lm_head))
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
        self.probe = build_probe(cfg, model, tokenizer, world, self.recorder.json_file)

        self.step = 0
        self.nonfinite = NonFiniteSteps(cfg)
        self.continues_method = False  # until the weights show that they hold the method's tensors
        self.checkpoints = CheckpointManager(
            self.output_dir / "checkpoints",
            keep_last_n=cfg.keep_last_n_checkpoints,
            world=world,
            timeout=cfg.save_timeout_seconds,
        )
        world.on_main(self.recorder.check)
        if cfg.resume != "auto" and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and world.is_main:
            log.warning("resume=%s: a restart by torchrun begins there again; auto goes on from the latest", cfg.resume)
        resume_from, saved = self.checkpoints.find(cfg.resume, self._check_checkpoint)
        self.parameters = parameter_table(model)
        if world.is_main:
            log.info("%s, method %s\n%s", cfg.model["_component_"], self.spec.method, self.parameters)
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

    def _load_model(self, model: LlamaDecoder) -> LlamaDecoder:
        new_tensors = initial_method_state(model, self.cfg.seed)
        parallelize(model, self.cfg, self.world)
        materialise(model, self.world.device, cpu_offload=self.cfg.fsdp_cpu_offload)
        load_weights(model, self._weights(new_tensors))
        return model

    def _weights(self, new_tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        yield from new_tensors.items()
        # After the start values: a folder of this project brings the method's trained tensors along.
        untie = self.cfg.untie_lm_head
        for name, tensor in pretrained_tensors(self.checkpoint_dir, self.spec, untie_lm_head=untie):
            self.continues_method |= is_method_tensor(name)
            yield name, tensor

    def _calibrate(self) -> None:
        """Show the methods the first global batches, however they are spread over ranks; training starts with the same
        ones again."""
        count = min(self.cfg.calibration_batches or CALIBRATION_BATCHES, self.steps_per_epoch)
        self.loader.start_epoch(0)
        taken = (self.loader.next_batch() for _ in range(count * self.accumulation))
        device = self.world.device
        batches = (model_inputs(self.loader, batch, device, mask_padding=True) for batch in together(taken, device))
        with uncompiled(self.model):
            self.model.calibrate(batches, reduce=dist.all_reduce)
        if self.world.is_main:
            log.info("calibrated on the first %d global batches", count)

    # ------------------------------------------------------------------ state

    def _check_checkpoint(self, path: Path, saved: dict[str, Any]) -> None:
        """Raises ConfigError if it belongs to another run or to other data."""
        check_same_run(saved["run"], self.run_identity(), path)
        self.loader.check_state(saved["loader"])

    def run_identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued."""
        return run_identity(
            self.spec,
            self.cfg,
            global_batch=self.global_batch,
            steps_per_epoch=self.steps_per_epoch,
            base_digest=self.base_digest,
        )

    def train_state(self) -> dict[str, Any]:
        """The JSON part of a checkpoint."""
        return {
            "step": self.step,
            "run": self.run_identity(),
            "spec": dataclasses.asdict(self.spec),  # with the config, all that a consolidation needs
            "config": dataclasses.asdict(self.cfg),
            "leaks_future": self.spec.leaks_future,
            "skipped_steps": self.nonfinite.skipped,
            "loader": self.loader.state_dict(),
            "lr_scheduler": None if self.scheduler is None else schedule_state(self.scheduler),
        }

    def _resume(self, path: Path, saved: dict[str, Any]) -> None:
        self.checkpoints.load(path, saved, self.model, self.optimizer)
        self.step = saved["step"]
        self.nonfinite.skipped = saved["skipped_steps"]
        self.loader.load_state_dict(saved["loader"])
        if self.scheduler is not None and saved["lr_scheduler"] is not None:
            if not restore_schedule(self.scheduler, saved["lr_scheduler"]):
                log.warning(
                    "optimizer.lr, lam_lr: no effect, the schedule goes on with the checkpoint's learning rates %s",
                    saved["lr_scheduler"]["base_lrs"],
                )
        if self.world.is_main:
            log.info("resuming from %s", path)

    def save(self, *, wait: bool = False) -> None:
        """Write a checkpoint of the last finished step, beside the training unless ``wait`` is set."""
        self.checkpoints.save(self.step, self.model, self.optimizer, self.train_state(), wait=wait)

    # ------------------------------------------------------------------ the loop

    def train(self) -> None:
        """Run to the last step, with validation and checkpoints on the way, then export.

        Raises:
            NonFiniteLossError: NaN or infinite loss or gradient; nothing was updated with it (with ``optimizer_in_bwd``
            the parameters in memory were), the last checkpoint stands.
            DataLostError: a rank cannot read its data any more; the last finished step is saved.
            Stopped: a rank received a signal; the last finished step is saved.
            NotSavedError: the last checkpoint or the results cannot be written.
        """
        cfg = self.cfg
        self.interruption.defer("the step is finished and saved, then the run stops")
        self.checkpoints.set_aside_after(self.step)
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
            if self._validation_is_missing():
                self._record_validation(recorder, progress)
            if self.probe is not None and self.probe.is_missing(self.step, self.total_steps):
                self._record_attention(recorder)
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
                if self._validation_is_due():
                    self._record_validation(recorder, progress)
                    throughput.reset()
                if self.probe is not None and self.probe.is_due(self.step, self.total_steps):
                    self._record_attention(recorder)
                    throughput.reset()
                if last or (cfg.save_every_n_steps and self.step % cfg.save_every_n_steps == 0):
                    self.pulse.enter("saving", self.step)
                    self.save(wait=last)
                    throughput.reset()
                self.profiler.step()
        except (Stopped, DataLostError) as end:
            self._save_last_step()
            if isinstance(end, Stopped):
                progress.message(self._stopped_by(end))
            raise
        finally:
            self.checkpoints.finish()
            self.profiler.stop()
            progress.close()
            if recorder is not None:
                recorder.close()
        self.interruption.defer("the results are written to the end")
        self.pulse.enter("writing the results", self.step)
        self.export()
        self.checkpoints.close()
        if recorder is not None:
            finish_record(recorder, {"validation_metrics/loss": "held-out NLL per token"})
            if self.probe is not None:
                self.probe.report()

    def _save_last_step(self) -> None:
        """Save the last finished step, unless that is done or there is none."""
        self.pulse.enter("saving", self.step)
        if self.step and not self.checkpoints.has(self.step):
            self.save(wait=True)
        # A rank that ends makes torchrun send SIGTERM to the others: not before all of them are deaf to it.
        self.interruption.ignore()
        dist.barrier()

    def _stopped_by(self, stop: Stopped) -> str:
        state = f"step {self.step} of {self.total_steps} is saved" if self.step else "no step was made"
        return f"stopped by {stop.cause.name}: {state}; the same command goes on from there"

    def _validation_is_due(self) -> bool:
        """Whether there is one after the step just made."""
        every = self.cfg.run_val_every_n_steps
        return self.loader_val is not None and (
            self.step in (0, self.total_steps) or (every is not None and self.step % every == 0)
        )

    def _validation_is_missing(self) -> bool:
        """Whether the start has one to make: the first of the run, or one that a signal cut short."""
        if not self._validation_is_due():
            return False
        recorded = self.world.on_main(lambda: [step for step, _ in self.recorder.history("validation_metrics/loss")])
        return self.step not in recorded

    def _record_attention(self, recorder: TensorBoardLogger | None) -> None:
        assert self.probe is not None
        self.pulse.enter("attention probe", self.step, watch=True)
        self.probe.record(self.model, self.step, recorder)

    def _train_step(self, logging_step: bool) -> tuple[dict[str, float], float, float]:
        """One optimizer step; returns its scalars, its input tokens over all ranks and the seconds spent waiting for
        data."""
        self.pulse.enter("training", self.step + 1, watch=True)
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
            [
                sum(b.num_label_tokens for b in batches),
                sum(b.num_input_tokens for b in batches),
                lost is not None,
                *self.interruption.flags(),
            ],
            dtype=torch.float64,
            device=self.world.device,
        )
        dist.all_reduce(counts)
        label_tokens, input_tokens, any_lost, *signals = agreed(counts)
        if any_lost or any(signals):  # the step is not made, so its data are the next one's
            self.loader.epoch, self.loader.position = before
            raise_everywhere(lost)
            stop_if_any(signals)
        self.pulse.mark()
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
            self.pulse.mark()
        loss = torch.stack(losses).sum().double()
        dist.all_reduce(loss)
        average = agreed(loss) / self.world.tensor_size / label_tokens
        norm = self.updates.total_norm()
        finite = math.isfinite(average) and math.isfinite(norm)
        if not finite:
            self.nonfinite.skip(
                self.step + 1, average, norm, batches, losses, self.updates.if_nonfinite, self.checkpoints.standing
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
        return summed_loss(self.model, loader, batch, self.world.device)

    def validate(self) -> float:
        """NLL per trained token over ``dataset_val``, in nats, teacher-forced."""
        assert self.loader_val is not None
        self.pulse.enter("validation", self.step, watch=True)
        return held_out_nll(self.model, self.loader_val, self.world, between=self.between_validation_batches)

    def between_validation_batches(self) -> None:
        """Tell the watchers that there is progress, and end if a rank received a signal; every rank must call it.

        Raises:
            Stopped: a rank received a signal.
        """
        self.pulse.mark()
        signals = torch.tensor(self.interruption.flags(), device=self.world.device)
        dist.all_reduce(signals)
        stop_if_any(agreed(signals))

    def _record_validation(self, recorder: TensorBoardLogger | None, progress: Progress) -> None:
        nll = self.validate()
        values = {"validation_metrics/loss": nll}
        message = f"step {self.step}: held-out NLL {nll:.4f} nats per token"
        if self.cfg.prefix_wise_positions:
            self.pulse.enter("prefix-wise validation", self.step, watch=True)
            values |= leak_values(
                self.model,
                cast(BatchLoader, self.loader_val),
                self.loader,
                self.world,
                positions=self.cfg.prefix_wise_positions,
                between=self.between_validation_batches,
            )
            leak = round(values["validation_metrics/leak"], 4) + 0.0  # no -0
            message += f", {leak:+.4f} when predicted from prefixes alone"
        progress.message(message)
        if recorder is not None:
            recorder.log(values, self.step)

    def _open_recorder(self) -> TensorBoardLogger | None:
        if not self.world.is_main:
            return None
        cfg, options = self.cfg, self.spec.method_options
        start_record(
            self.recorder,
            cfg,
            hyperparameters(cfg, options, global_batch_size=self.global_batch, steps=self.total_steps),
            parameters=self.parameters,
            counts=bad_row_counts(cfg, self.loader, self.loader_val),
            resumed_step=self.step,
        )
        if self.probe is not None:
            self.probe.start(self.step)
        return self.recorder

    # ------------------------------------------------------------------ results

    def export(self) -> None:
        """Write ``output_dir/adapter`` and ``output_dir/hf``. A leaking model is kept as a checkpoint only."""
        if self.spec.leaks_future:
            log.warning(
                "integral=sequence: nothing exported, the model reads future tokens; its checkpoint is in %s",
                self.checkpoints.folder.path,
            )
            return
        write_results(self.model, self.cfg)
