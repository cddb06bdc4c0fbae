"""From a whole model on the meta device to this rank's part of it: every change to the modules, in the one order that
is right."""

from __future__ import annotations

import torch

from lrdint_tune.errors import ConfigError
from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.training.activations import checkpoint_activations
from lrdint_tune.training.compilation import check_compiler, compile_blocks
from lrdint_tune.training.config import TrainConfig
from lrdint_tune.training.nf4 import check_nf4, quantize_base
from lrdint_tune.training.offloading import offload_activations
from lrdint_tune.training.precision import check_fp8_shards, set_precision
from lrdint_tune.training.sharding import shard_model
from lrdint_tune.training.tensor_parallel import apply_tensor_parallel, check_tensor_parallel
from lrdint_tune.training.world import World


def check_parallel(model: LlamaDecoder, cfg: TrainConfig, device: torch.device, num_shards: int) -> None:
    """That the model can be changed as the config says, on ``device``, sharded over ``num_shards`` ranks.

    Raises:
        ConfigError: it cannot; the message names what stands in the way.
    """
    check_tensor_parallel(model, cfg.tensor_parallel_dim)
    if cfg.fp8 != "none":
        check_fp8_shards(model, cfg.tensor_parallel_dim)
    if cfg.quantize_base == "nf4":
        check_nf4(model, num_shards, cpu_offload=cfg.fsdp_cpu_offload)
    if cfg.compile:
        check_compiler(device.type)
    if cfg.context_parallel_dim > 1:
        for method in model.methods():
            if method.context_parallel_refusal is not None:
                raise ConfigError(f"context_parallel_dim={cfg.context_parallel_dim}: {method.context_parallel_refusal}")


def parallelize(model: LlamaDecoder, cfg: TrainConfig, world: World) -> None:
    """Make ``model`` (meta device, ``requires_grad`` set) the part of it that this rank trains, without memory."""
    set_precision(model, cfg.dtype)
    if cfg.quantize_base == "nf4":
        quantize_base(model)
    model.sequence_shard = world.context
    if world.tensor_size > 1:
        apply_tensor_parallel(model, world.mesh["tensor"])
    if cfg.enable_activation_checkpointing:
        checkpoint_activations(model, cfg.ac_mode, cfg.ac_option)
    if cfg.compile:
        compile_blocks(model)
    if cfg.enable_activation_offloading:
        offload_activations(model)
    shard_model(
        model,
        world.mesh,
        cfg.dtype,
        reshard_after_forward=cfg.fsdp_reshard_after_forward,
        cpu_offload=cfg.fsdp_cpu_offload,
    )
