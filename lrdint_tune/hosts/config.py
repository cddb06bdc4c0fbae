"""The keys of a config of ``lrdint_tune.finetune_transformers``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lrdint_tune.errors import ConfigError
from lrdint_tune.hosts.model import TRAINABLE_GROUPS
from lrdint_tune.training.config import RunConfig, check_choice


@dataclass(frozen=True)
class HostConfig(RunConfig):
    """The keys of every training config, with a shorter default ``max_seq_len``."""

    groups: ClassVar[tuple[str, ...]] = TRAINABLE_GROUPS

    max_seq_len: int = 512

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, ("bf16", "fp32"))
        super().__post_init__()
        if set(self.checkpointer) != {"checkpoint_dir"}:
            raise ConfigError(
                f"checkpointer={self.checkpointer}: must hold checkpoint_dir alone, the folder of the weights"
            )
        if (self.global_batch_size or 0) % self.batch_size:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size}: not a multiple of batch_size={self.batch_size}"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step."""
        return (self.global_batch_size or 0) // self.batch_size or self.gradient_accumulation_steps or 1
