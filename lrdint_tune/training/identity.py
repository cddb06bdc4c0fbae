"""What makes a run the same run: a checkpoint is continued by no other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lrdint_tune.errors import ConfigError
from lrdint_tune.models.spec import ModelSpec
from lrdint_tune.training.config import TrainConfig


def run_identity(
    spec: ModelSpec, cfg: TrainConfig, *, global_batch: int, steps_per_epoch: int, base_digest: str
) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued, by the names that a refusal tells the user.

    Args:
        global_batch: sequences of an optimizer step.
        base_digest: of the pretrained weights, see :func:`~lrdint_tune.models.hf.weights_digest`.
    """
    model = dataclasses.asdict(spec)
    options = model.pop("method_options")
    if cfg.quantize_base != "none":  # other weights than those of the folder
        model["quantize_base"] = cfg.quantize_base
    return {
        **model,
        **options,
        "trainable": sorted(cfg.trainable),
        "global_batch_size": global_batch,
        "max_seq_len": cfg.max_seq_len,
        "seed": cfg.seed,
        "steps_per_epoch": steps_per_epoch,
        "optimizer": cfg.optimizer["_component_"],
        "lr_scheduler": None if cfg.lr_scheduler is None else cfg.lr_scheduler["_component_"],
        "checkpoint_dir weights": base_digest,
    }


def check_same_run(saved: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    """Refuse to continue a run of another model, method or training setup.

    Raises:
        ConfigError: listing the keys that differ, with both values.
    """
    keys = sorted(set(saved) | set(current))
    differing = [
        f"{key} is {saved.get(key)!r} there and {current.get(key)!r} here"
        for key in keys
        if saved.get(key) != current.get(key)
    ]
    if differing:
        raise ConfigError(
            f"resume={path}: checkpoint of another run: {'; '.join(differing)}; use another output_dir or resume=never"
        )
