"""What a training step of each method costs beside one without any: both timed in the same rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.reproduce.runs import Preset, Run
from lrdint_tune.training.components import build_model
from lrdint_tune.training.config import load_config
from lrdint_tune.training.flops import training_flops_per_token
from lrdint_tune.training.trainable import set_trainable
from lrdint_tune.training.weights import materialise

BASELINE = "none"


def step_time_ratios(
    preset: Preset, runs: Mapping[str, Run], *, rounds: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Forward and backward of one batch for every run, in turns with the baseline's, by which each is divided.

    The weights are random: they do not change the time. No optimizer step, whose cost is that of the trained
    parameters. Two models are held at a time.

    Args:
        preset: the model and ``max_seq_len``.
        runs: name -> run; ``none`` must be there.
        rounds: after one that is not counted.
        tokens: of a batch, a multiple of ``max_seq_len``.
        dtype, device: of the models.

    Returns:
        name -> the median ratio, its quartiles, and the ratio of FLOPs (causal half of attention).
    """
    n = preset.config["max_seq_len"]
    baseline = _model(preset, runs[BASELINE], dtype, device)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, baseline.spec.vocab_size, (tokens // n, n), generator=generator).to(device)
    base_flops = training_flops_per_token(baseline, n, causal=True)
    result = {}
    for name, run in runs.items():
        model = baseline if name == BASELINE else _model(preset, run, dtype, device)
        ratios = [1.0] * rounds
        if model is not baseline:
            ratios = [_seconds(model, batch) / _seconds(baseline, batch) for _ in range(rounds + 1)][1:]
        low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        flops = training_flops_per_token(model, n, causal=True) / base_flops
        result[name] = {"median": median, "quartiles": [low, high], "flops": flops}
    return result


def _seconds(model: LlamaDecoder, batch: Tensor) -> float:
    if batch.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(batch, labels=batch.roll(-1, 1)).backward()
    if batch.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds


def _model(preset: Preset, run: Run, dtype: torch.dtype, device: torch.device) -> LlamaDecoder:
    config: Any = OmegaConf.create({**preset.config, "output_dir": "unused"})
    for key, value in run.changes.items():
        OmegaConf.update(config, key, value, merge=False)
    cfg = load_config(config)
    model = build_model(cfg)
    set_trainable(model, cfg.trainable)
    materialise(model, device)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.advance_schedule(1)
    return model.to(dtype)
