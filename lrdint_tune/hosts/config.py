"""The keys of a config of ``lrdint_tune.finetune_transformers``."""

from __future__ import annotations

from dataclasses import dataclass, field

from lrdint_tune.errors import ConfigError
from lrdint_tune.hosts.model import TRAINABLE_GROUPS
from lrdint_tune.training.config import Section

_AT_LEAST_ONE = (
    "max_seq_len",
    "batch_size",
    "batch_size_val",
    "gradient_accumulation_steps",
    "global_batch_size",
    "epochs",
    "max_steps_per_epoch",
    "calibration_batches",
    "log_every_n_steps",
)
_SECTIONS = ("tokenizer", "model", "dataset", "dataset_val", "optimizer", "lr_scheduler", "metric_logger")


@dataclass(frozen=True)
class HostConfig:
    """Keys mean what they mean in :class:`~lrdint_tune.training.config.TrainConfig`."""

    output_dir: str
    tokenizer: Section
    model: Section
    checkpointer: Section
    dataset: Section
    optimizer: Section
    trainable: list[str] = field(default_factory=lambda: ["adapter"])
    max_seq_len: int = 512
    dataset_val: Section | None = None
    shuffle: bool = True
    batch_size: int = 1
    batch_size_val: int | None = None
    gradient_accumulation_steps: int | None = None
    global_batch_size: int | None = None
    epochs: int = 1
    max_steps_per_epoch: int | None = None
    lr_scheduler: Section | None = None
    lam_lr: float | None = None
    calibration_batches: int | None = None
    clip_grad_norm: float | None = None
    device: str = "auto"
    dtype: str = "bf16"
    seed: int = 0
    log_every_n_steps: int = 1
    metric_logger: Section | None = None

    def __post_init__(self) -> None:
        for key, value, valid in (
            ("dtype", self.dtype, ("bf16", "fp32")),
            ("device", self.device, ("auto", "cpu", "cuda")),
        ):
            if value not in valid:
                raise ConfigError(f"{key}={value!r}: unknown; choose from {', '.join(valid)}")
        for key in _AT_LEAST_ONE:
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"{key}={value}: must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must not be negative")
        for key in ("clip_grad_norm", "lam_lr"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ConfigError(f"{key}={value}: must be positive; leave it out to switch it off")
        if not self.trainable:
            raise ConfigError(f"trainable=[]: nothing to train; list some of {', '.join(TRAINABLE_GROUPS)}")
        for key in _SECTIONS:
            section = getattr(self, key)
            if section is not None and "_component_" not in section:
                raise ConfigError(f"{key}={section}: has no _component_; give the dotted path of what to build")
        if set(self.checkpointer) != {"checkpoint_dir"}:
            raise ConfigError(
                f"checkpointer={self.checkpointer}: must hold checkpoint_dir alone, the folder of the weights"
            )
        if self.gradient_accumulation_steps and self.global_batch_size:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size}: also gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps} is set; one follows from the other, remove one"
            )
        if (self.global_batch_size or 0) % self.batch_size:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size}: not a multiple of batch_size={self.batch_size}"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step."""
        return (self.global_batch_size or 0) // self.batch_size or self.gradient_accumulation_steps or 1
