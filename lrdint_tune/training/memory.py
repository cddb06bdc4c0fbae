"""Which ways of saving memory go together, and where they can run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lrdint_tune.errors import ConfigError

if TYPE_CHECKING:
    from lrdint_tune.training.config import TrainConfig


def check_memory(cfg: TrainConfig) -> None:
    """What the config alone shows.

    Raises:
        ConfigError: ``enable_activation_offloading`` without activation checkpointing of every block, or
            ``optimizer_in_bwd`` with ``clip_grad_norm``.
    """
    if cfg.enable_activation_offloading and not cfg.enable_activation_checkpointing:
        raise ConfigError(
            "enable_activation_offloading=true: without enable_activation_checkpointing every intermediate result "
            "would travel, views of gathered weights too; set enable_activation_checkpointing=true"
        )
    if cfg.enable_activation_offloading and cfg.ac_mode == "every_k":
        raise ConfigError(
            "enable_activation_offloading=true: with ac_mode='every_k' every intermediate result of the other blocks "
            "would travel; set ac_mode=full or selective"
        )
    if cfg.optimizer_in_bwd and cfg.clip_grad_norm is not None:
        raise ConfigError(
            f"optimizer_in_bwd=true: clip_grad_norm={cfg.clip_grad_norm} needs all gradients at once, and here each is "
            "used and freed alone; set one of them to false or null"
        )


def check_device(cfg: TrainConfig, device: torch.device) -> None:
    """That the device has a memory beside the CPU's, where a key would move something between the two.

    Raises:
        ConfigError: it has not.
    """
    for key in ("enable_activation_offloading", "fsdp_cpu_offload"):
        if getattr(cfg, key) and device.type != "cuda":
            raise ConfigError(f"{key}=true: needs CUDA, this run is on {device.type}; remove it")


def check_passes(cfg: TrainConfig, passes: int, data_size: int) -> None:
    """That ``optimizer_in_bwd`` sees whole gradients.

    Args:
        passes: forward and backward passes of an optimizer step on each rank.
        data_size: data-parallel ranks.

    Raises:
        ConfigError: there are several.
    """
    if cfg.optimizer_in_bwd and passes > 1:
        key = "global_batch_size" if cfg.global_batch_size else "gradient_accumulation_steps"
        raise ConfigError(
            f"optimizer_in_bwd=true: {key}={getattr(cfg, key)} makes {passes} passes a step on {data_size} "
            f"data-parallel rank(s) with batch_size={cfg.batch_size}, and the first would already update; set "
            f"{key}={cfg.batch_size * data_size if cfg.global_batch_size else 1} or optimizer_in_bwd=false"
        )
