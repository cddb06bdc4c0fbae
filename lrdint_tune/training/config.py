"""The run's configuration, checked before anything expensive happens.

Keys are torchtune's where torchtune has one. Nested ``_component_`` sections stay plain dicts and are instantiated
where they are used.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints, overload

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lrdint_tune.errors import ConfigError
from lrdint_tune.training.memory import check_memory
from lrdint_tune.training.precision import FP8_RECIPES, check_precision_keys
from lrdint_tune.training.probe_options import ProbeOptions, check_probe
from lrdint_tune.training.profiling import check_profiler
from lrdint_tune.training.trainable import TRAINABLE_GROUPS

Section = dict[str, Any]

DEFAULT_SKIPPED_STEPS = 10
# Seconds. A loaded machine delays beats; the process group has its own limit.
SHORTEST_TIMEOUT, GROUP_TIMEOUT = 3.0, 1800.0


@dataclass(frozen=True)
class RunConfig:
    """The keys that every training config may have. Sizes are in tokens, intervals in optimizer steps.

    Attributes:
        groups: what ``trainable`` may list.
    """

    groups: ClassVar[tuple[str, ...]]

    output_dir: str
    tokenizer: Section
    model: Section
    checkpointer: Section
    dataset: Section
    optimizer: Section
    # What is trained
    trainable: list[str] = field(default_factory=lambda: ["adapter"])
    # Data
    max_seq_len: int = 2048
    dataset_val: Section | None = None
    shuffle: bool = True
    batch_size: int = 1
    batch_size_val: int | None = None
    gradient_accumulation_steps: int | None = None
    global_batch_size: int | None = None
    # Optimisation
    epochs: int = 1
    max_steps_per_epoch: int | None = None
    lr_scheduler: Section | None = None
    lam_lr: float | None = None
    calibration_batches: int | None = None
    clip_grad_norm: float | None = None
    # Machine
    device: str = "auto"
    dtype: str = "bf16"
    seed: int = 0
    # Records
    log_every_n_steps: int = 1
    metric_logger: Section | None = None

    def __post_init__(self) -> None:
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        self._at_least_one(
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
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must not be negative")
        for key in ("clip_grad_norm", "lam_lr"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:  # NaN is refused too
                raise ConfigError(f"{key}={value}: must be a positive number; leave it out to switch it off")
        if self.gradient_accumulation_steps and self.global_batch_size:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size}: also gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps} is set; one follows from the other, remove one"
            )
        if not self.trainable:
            raise ConfigError(f"trainable=[]: nothing to train; list some of {', '.join(self.groups)}")
        for key in ("tokenizer", "model", "dataset", "dataset_val", "optimizer", "lr_scheduler", "metric_logger"):
            section = getattr(self, key)
            if section is not None and "_component_" not in section:
                raise ConfigError(f"{key}={section}: has no _component_; give the dotted path of what to build")
        folder = self.checkpointer.get("checkpoint_dir", "")
        if not isinstance(folder, str):
            raise ConfigError(f"checkpointer.checkpoint_dir={folder!r}: must be str; give the folder of the weights")

    def _at_least_one(self, *keys: str) -> None:
        for key in keys:
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"{key}={value}: must be at least 1")


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Every key that a config of the FSDP2 recipe may have."""

    groups: ClassVar[tuple[str, ...]] = TRAINABLE_GROUPS

    trainable: list[str] = field(default_factory=lambda: ["adapter", "attention"])
    untie_lm_head: bool = False
    # Machine
    init_timeout_seconds: int = 300
    data_parallel_replicate_dim: int = 1
    data_parallel_shard_dim: int = -1
    tensor_parallel_dim: int = 1
    context_parallel_dim: int = 1
    enable_activation_checkpointing: bool = False
    ac_mode: str = "full"
    ac_option: int | None = None
    enable_activation_offloading: bool = False
    fsdp_cpu_offload: bool = False
    fsdp_reshard_after_forward: bool = True
    optimizer_in_bwd: bool = False
    on_nonfinite: str = "stop"
    max_skipped_steps: int | None = None
    compile: bool = False
    fp8: str = "none"
    fp8_all_gather: bool = False
    quantize_base: str = "none"
    train_timeout_seconds: float = 600.0
    # Checkpoints and records
    save_every_n_steps: int | None = None
    keep_last_n_checkpoints: int = 2
    save_timeout_seconds: int = 3600
    resume: str = "auto"
    run_val_every_n_steps: int | None = None
    prefix_wise_positions: int | None = None
    peak_tflops: float | None = None
    profiler: Section | None = None
    attention_probe: Section | None = None

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, ("bf16", "fp32"), hint="fp16 is not supported: its range needs loss scaling")
        super().__post_init__()
        check_choice("fp8", self.fp8, FP8_RECIPES)
        check_choice("quantize_base", self.quantize_base, ("none", "nf4"))
        check_choice("on_nonfinite", self.on_nonfinite, ("stop", "skip_step"))
        if self.max_skipped_steps is not None and self.on_nonfinite == "stop":
            raise ConfigError(
                f"max_skipped_steps={self.max_skipped_steps}: has no effect with on_nonfinite='stop'; set "
                "on_nonfinite=skip_step, or remove it"
            )
        if self.optimizer_in_bwd and self.on_nonfinite == "skip_step":
            raise ConfigError(
                "on_nonfinite='skip_step': with optimizer_in_bwd=true the parameters are updated before the gradient "
                "is known to be finite; use on_nonfinite=stop"
            )
        check_choice("ac_mode", self.ac_mode, ("full", "every_k", "selective"))
        if self.ac_mode == "every_k" and self.ac_option is None:
            raise ConfigError(
                "ac_option: missing with ac_mode='every_k'; set it to k: every k-th block is checkpointed"
            )
        if self.ac_mode != "every_k" and self.ac_option is not None:
            raise ConfigError(f"ac_option={self.ac_option}: has no effect with ac_mode={self.ac_mode!r}; remove it")
        self._at_least_one(
            "init_timeout_seconds",
            "ac_option",
            "max_skipped_steps",
            "save_every_n_steps",
            "save_timeout_seconds",
            "keep_last_n_checkpoints",
            "run_val_every_n_steps",
            "prefix_wise_positions",
            "data_parallel_replicate_dim",
            "tensor_parallel_dim",
            "context_parallel_dim",
        )
        if self.data_parallel_shard_dim < 1 and self.data_parallel_shard_dim != -1:
            raise ConfigError(
                f"data_parallel_shard_dim={self.data_parallel_shard_dim}: must be at least 1, or -1 for the rest"
            )
        if self.max_seq_len % self.context_parallel_dim:
            raise ConfigError(
                f"context_parallel_dim={self.context_parallel_dim}: does not divide max_seq_len={self.max_seq_len} "
                f"({self.max_seq_len} / {self.context_parallel_dim} = "
                f"{self.max_seq_len / self.context_parallel_dim:.2f}); change one of them"
            )
        for group in self.trainable:
            check_choice("trainable", group, self.groups)
        check_precision_keys(self)
        for key in ("run_val_every_n_steps", "prefix_wise_positions"):
            if getattr(self, key) and self.dataset_val is None:
                raise ConfigError(f"{key}={getattr(self, key)}: there is no dataset_val; add that section")
        if self.prefix_wise_positions and self.context_parallel_dim * self.tensor_parallel_dim > 1:
            raise ConfigError(
                f"prefix_wise_positions={self.prefix_wise_positions}: is not there for context_parallel_dim or "
                "tensor_parallel_dim > 1; measure the leak with data parallelism alone"
            )
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ConfigError(f"peak_tflops={self.peak_tflops:g}: must be positive; leave it out if it is not known")
        if not SHORTEST_TIMEOUT <= self.train_timeout_seconds < GROUP_TIMEOUT:
            raise ConfigError(
                f"train_timeout_seconds={self.train_timeout_seconds:g}: must be at least {SHORTEST_TIMEOUT:g} and less "
                f"than {GROUP_TIMEOUT:g}, when collectives give up"
            )
        check_memory(self)
        check_profiler(self.profiler)
        _ = self.probe_options
        if "checkpoint_dir" not in self.checkpointer:
            raise ConfigError(
                f"checkpointer={self.checkpointer}: has no checkpoint_dir; give the folder of the pretrained weights"
            )
        _known("checkpointer", self.checkpointer, ("checkpoint_dir", "base_model_name_or_path"))

    @property
    def probe_options(self) -> ProbeOptions | None:
        """The checked ``attention_probe`` section, None without one."""
        return check_probe(
            self.attention_probe, context_size=self.context_parallel_dim, tensor_size=self.tensor_parallel_dim
        )

    @property
    def skipped_steps_limit(self) -> int:
        """How many steps a run may skip: 10 if ``max_skipped_steps`` does not say."""
        return self.max_skipped_steps or DEFAULT_SKIPPED_STEPS

    @property
    def mesh_dims(self) -> dict[str, int]:
        """The sizes asked for, as :func:`~lrdint_tune.training.world.mesh_shape` and ``start_world`` take them."""
        return {
            "replicate": self.data_parallel_replicate_dim,
            "shard": self.data_parallel_shard_dim,
            "context": self.context_parallel_dim,
            "tensor": self.tensor_parallel_dim,
        }


_Config = TypeVar("_Config")


@overload
def load_config(cfg: DictConfig | dict[str, Any]) -> TrainConfig: ...


@overload
def load_config(cfg: DictConfig | dict[str, Any], kind: type[_Config]) -> _Config: ...


def load_config(cfg: DictConfig | dict[str, Any], kind: type[Any] = TrainConfig) -> Any:
    """Turn a parsed YAML into a checked config of the dataclass ``kind``.

    Raises:
        ConfigError: an unknown or missing key, a value of the wrong type or out of range, an interpolation that does
        not resolve.
    """
    try:
        raw = (
            OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
            if isinstance(cfg, DictConfig)
            else dict(cfg)
        )
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}=???: a value that was left open; give it") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"config: {str(error).splitlines()[0]}; check the ${{...}} references") from None
    assert isinstance(raw, dict)
    values = {str(key): value for key, value in raw.items()}
    _known("config", values, tuple(f.name for f in fields(kind)))
    hints = get_type_hints(kind)
    for f in fields(kind):
        if f.name not in values:
            if f.default is MISSING and f.default_factory is MISSING:
                raise ConfigError(f"{f.name}: missing from the config; add it")
            continue
        values[f.name] = typed(f.name, values[f.name], hints[f.name])
    return kind(**values)


def typed(key: str, value: Any, hint: Any) -> Any:
    """``value`` as ``hint`` wants it (whole numbers for floats, one text for a list). Raises ConfigError otherwise."""
    options = [h for h in (get_args(hint) or (hint,))] if get_origin(hint) not in (list, dict) else [hint]
    if value is None and type(None) in options:
        return None
    for option in options:
        kind = get_origin(option) or option
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if kind is list and isinstance(value, str):
            return [value]
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
    names = " or ".join("null" if o is type(None) else (get_origin(o) or o).__name__ for o in options)
    raise ConfigError(f"{key}={value!r}: must be {names}")


def check_choice(key: str, value: str, valid: tuple[str, ...], hint: str = "") -> None:
    """Raises ConfigError unless ``value`` is one of ``valid``; ``hint`` is added for fp16."""
    if value not in valid:
        extra = f" ({hint})" if hint and value == "fp16" else ""
        raise ConfigError(f"{key}={value!r}: unknown{extra}; choose from {', '.join(valid)}")


def _known(where: str, given: dict[str, Any], valid: tuple[str, ...]) -> None:
    for key in given:
        if key not in valid:
            close = difflib.get_close_matches(key, valid, n=1)
            fix = f"did you mean {close[0]}?" if close else f"valid keys: {', '.join(valid)}"
            raise ConfigError(f"{where}: unknown key {key}={given[key]!r}; {fix}")
