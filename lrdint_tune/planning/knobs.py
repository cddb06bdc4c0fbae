"""What of a config decides how much memory and time a step takes, in one flat record that a search can vary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lrdint_tune.training.components import accumulation_steps
from lrdint_tune.training.config import TrainConfig
from lrdint_tune.training.world import mesh_shape


@dataclass(frozen=True)
class Knobs:
    """A run's settings, resolved against its number of ranks.

    Attributes:
        replicate, shard, tensor, context: the mesh; their product is the number of ranks. FSDP shards over
            ``shard x context``.
        batch_size: sequences of a micro-batch on each data-parallel rank.
        passes: micro-batches of an optimizer step on each rank.
        reshard: whether a block's gathered parameters are freed between forward and backward.
        checkpointing: ``none | full | selective | every_k``; ``every`` is that k.
        optimizer: the config's section.
    """

    replicate: int
    shard: int
    tensor: int
    context: int
    batch_size: int
    passes: int
    checkpointing: str
    every: int
    reshard: bool
    cpu_offload: bool
    activation_offloading: bool
    optimizer_in_bwd: bool
    fp8: bool
    fp8_all_gather: bool
    nf4: bool
    optimizer: Mapping[str, Any]

    @classmethod
    def from_config(cls, cfg: TrainConfig, world_size: int) -> Knobs:
        """Raises ConfigError when the mesh or the global batch does not fit ``world_size``."""
        mesh = mesh_shape(world_size, **cfg.mesh_dims)
        return cls(
            replicate=mesh.replicate,
            shard=mesh.shard,
            tensor=mesh.tensor,
            context=mesh.context,
            batch_size=cfg.batch_size,
            passes=accumulation_steps(cfg, mesh.replicate * mesh.shard),
            checkpointing=cfg.ac_mode if cfg.enable_activation_checkpointing else "none",
            every=cfg.ac_option or 1,
            reshard=cfg.fsdp_reshard_after_forward,
            cpu_offload=cfg.fsdp_cpu_offload,
            activation_offloading=cfg.enable_activation_offloading,
            optimizer_in_bwd=cfg.optimizer_in_bwd,
            fp8=cfg.fp8 != "none",
            fp8_all_gather=cfg.fp8_all_gather,
            nf4=cfg.quantize_base == "nf4",
            optimizer=cfg.optimizer,
        )

    def config(self, cfg: TrainConfig) -> TrainConfig:
        """``cfg`` with these settings. Raises ConfigError where they do not go together."""
        steps: dict[str, Any] = {"gradient_accumulation_steps": self.passes}
        if cfg.global_batch_size:
            steps = {"global_batch_size": self.passes * self.batch_size * self.data_parallel}
        checkpointing: dict[str, Any] = {"enable_activation_checkpointing": self.checkpointing != "none"}
        if self.checkpointing != "none":
            checkpointing["ac_mode"] = self.checkpointing
            checkpointing["ac_option"] = self.every if self.checkpointing == "every_k" else None
        return replace(
            cfg,
            data_parallel_replicate_dim=self.replicate,
            data_parallel_shard_dim=self.shard,
            tensor_parallel_dim=self.tensor,
            context_parallel_dim=self.context,
            batch_size=self.batch_size,
            fsdp_reshard_after_forward=self.reshard,
            fsdp_cpu_offload=self.cpu_offload,
            enable_activation_offloading=self.activation_offloading,
            optimizer_in_bwd=self.optimizer_in_bwd,
            quantize_base="nf4" if self.nf4 else "none",
            optimizer=dict(self.optimizer),
            **steps,
            **checkpointing,
        )

    @property
    def fsdp(self) -> int:
        """Over how many ranks FSDP shards a parameter."""
        return self.shard * self.context

    @property
    def data_parallel(self) -> int:
        return self.replicate * self.shard

    def checkpointed(self, layer: int) -> bool:
        """Whether block ``layer`` is recomputed in the backward pass."""
        return self.checkpointing != "none" and (
            self.checkpointing != "every_k" or layer % self.every == self.every - 1
        )

    def num_checkpointed(self, num_layers: int) -> int:
        return sum(self.checkpointed(layer) for layer in range(num_layers))
