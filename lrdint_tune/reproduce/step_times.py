"""What a training step of each method costs beside one without any: both timed in the same rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import OmegaConf

from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.reproduce.runs import Preset, Run
from lrdint_tune.training.components import build_model
from lrdint_tune.training.config import load_config
from lrdint_tune.training.flops import training_flops_per_token
from lrdint_tune.training.trainable import set_trainable
from lrdint_tune.training.weights import materialise

BASELINE = "none"


def step_time_ratios(
    preset: Preset, runs: Mapping[str, Run], *, rounds: int, tokens: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Forward and backward of one batch for every run, round by round, each divided by the baseline's of its round.

    The weights are random: they do not change the time. No optimizer step, whose cost is that of the trained
    parameters.

    Args:
        preset: the model and ``max_seq_len``.
        runs: name -> run; ``none`` must be there.
        rounds: after one that is not counted.
        tokens: of a batch, a multiple of ``max_seq_len``.

    Returns:
        name -> the median ratio, its quartiles, and the ratio of FLOPs (causal half of attention).
    """
    models = {name: _model(preset, run, dtype) for name, run in runs.items()}
    n = preset.config["max_seq_len"]
    generator = torch.Generator().manual_seed(0)
    vocab = next(iter(models.values())).spec.vocab_size
    batch = torch.randint(0, vocab, (tokens // n, n), generator=generator)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(batch, labels=batch.roll(-1, 1)).backward()
            seconds[name].append(time.perf_counter() - start)
            model.zero_grad(set_to_none=True)
    flops = {name: training_flops_per_token(model, n, causal=True) for name, model in models.items()}
    result = {}
    for name in models:
        ratios = [own / base for own, base in zip(seconds[name][1:], seconds[BASELINE][1:], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        result[name] = {"median": median, "quartiles": [low, high], "flops": flops[name] / flops[BASELINE]}
    return result


def _model(preset: Preset, run: Run, dtype: torch.dtype) -> LlamaDecoder:
    config: Any = OmegaConf.create({**preset.config, "output_dir": "unused"})
    for key, value in run.changes.items():
        OmegaConf.update(config, key, value, merge=False)
    cfg = load_config(config)
    model = build_model(cfg)
    set_trainable(model, cfg.trainable)
    materialise(model, torch.device("cpu"))
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.advance_schedule(1)
    return model.to(dtype)
