"""Building what a config's ``_component_`` sections name, with errors a user can act on."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from omegaconf import OmegaConf
from torchtune.config import instantiate
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path

from lrdint_tune.attention import method_options
from lrdint_tune.errors import ConfigError
from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.training.config import RunConfig, Section, TrainConfig, typed
from lrdint_tune.training.data import BatchLoader, main_process_first
from lrdint_tune.training.metrics import TensorBoardLogger
from lrdint_tune.training.precision import convert_to_fp8
from lrdint_tune.training.world import World, resolve_device


def build(key: str, section: Section, *args: Any, **kwargs: Any) -> Any:
    """Call the component that ``section`` names with its options, ``args`` before and ``kwargs`` over them.

    Raises:
        ConfigError: the component does not exist or does not take an option.
    """
    path = section["_component_"]
    try:
        component = _get_component_from_path(path)
    except (InstantiationError, ImportError, AttributeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"{key}._component_={path!r}: not found ({reason}); check the dotted path") from None
    try:
        options = {name: value for name, value in section.items() if name != "_component_"}
        inspect.signature(component).bind(*args, **{**options, **kwargs})
    except TypeError as error:
        raise ConfigError(f"{key}: {path} does not accept these options ({error}); check the section's keys") from None
    if path.startswith("lrdint_tune."):  # others' annotations may be narrower than what they take
        check_types(key, component, options)
    try:
        return instantiate(OmegaConf.create(section), *args, **kwargs)
    except ConfigError:
        raise
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{key}: {path} refuses these values ({reason}); check the section's values") from error


def check_types(key: str, component: Any, options: Section) -> None:
    """That the options whose annotation is text, a number, a flag or null are that; of others the component decides.

    Raises:
        ConfigError: naming the option, its value and what it must be.
    """
    hints = get_type_hints(component.__init__ if inspect.isclass(component) else component)
    for name, value in options.items():
        hint = hints.get(name)
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if all(kind in (str, int, float, bool, NoneType) for kind in kinds):
            typed(f"{key}.{name}", value, hint)


def build_tokenizer(section: Section) -> Any:
    """The tokenizer. Raises ConfigError when one of its files is missing or damaged."""
    for name, value in section.items():
        # A number would be taken for an open file.
        if name.endswith("path") and value is not None and not (isinstance(value, str) and Path(value).is_file()):
            raise ConfigError(f"tokenizer.{name}={value!r}: no such file; point it at the model's tokenizer file")
    try:
        return build("tokenizer", section)
    except ConfigError:
        raise
    except Exception as error:  # the tokenizers library raises nothing more special for a damaged file
        files = ", ".join(f"{name}={value!r}" for name, value in section.items() if name.endswith("path"))
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"tokenizer: cannot be read from {files} ({reason}); get the files again") from error


def build_model(cfg: TrainConfig, *, total_steps: int | None = None) -> LlamaDecoder:
    """The model on the meta device, without memory.

    ``anneal_steps`` of an annealed λ defaults to half of ``total_steps``, when the length of the run is known.

    Raises:
        ConfigError: unknown model, method or option, or a value out of range.
    """
    section = dict(cfg.model)
    options = method_options(section.get("method", "none"))
    annealed = section.get("lam", options.get("lam")) == "annealed"
    if annealed and section.get("anneal_steps") is None and total_steps is not None:
        section["anneal_steps"] = max(1, total_steps // 2)
    if cfg.untie_lm_head:
        with torch.device("meta"):
            if not build("model", section).spec.tie_word_embeddings:
                raise ConfigError("untie_lm_head=true: this model already has its own head; remove it")
        section["tie_word_embeddings"] = False
    with torch.device("meta"):
        model = build("model", section)
    if not isinstance(model, LlamaDecoder):
        raise ConfigError(
            f"model._component_={section['_component_']!r}: does not build a lrdint_tune model; use one of "
            "lrdint_tune.models"
        )
    if cfg.fp8 != "none":
        if adapters := model.spec.adapters:  # on layers that the conversion replaces
            with torch.device("meta"):
                model = build("model", {**section, "adapters": None})
        convert_to_fp8(model, cfg.fp8, all_gather=cfg.fp8_all_gather, emulate=resolve_device(cfg.device).type == "cpu")
        model.attach_adapters(adapters)
    if cfg.max_seq_len > model.spec.max_seq_len:
        raise ConfigError(f"max_seq_len={cfg.max_seq_len}: the model's limit is {model.spec.max_seq_len}; lower it")
    return model


def build_recorder(cfg: RunConfig) -> TensorBoardLogger:
    """What writes the curves. If the config does not say, the event files go into ``output_dir``, by whose name
    TensorBoard then calls the run, and the rest into ``output_dir/logs``.

    Raises:
        ConfigError: another component than this package's, or one of its options is wrong.
    """
    default = {
        "_component_": "lrdint_tune.training.metrics.TensorBoardLogger",
        "log_dir": str(Path(cfg.output_dir) / "logs"),
        "events_dir": cfg.output_dir,
    }
    recorder = build("metric_logger", cfg.metric_logger or default)
    if not isinstance(recorder, TensorBoardLogger):
        raise ConfigError(f"metric_logger={cfg.metric_logger}: use lrdint_tune.training.metrics.TensorBoardLogger")
    return recorder


def accumulation_steps(cfg: TrainConfig, data_size: int) -> int:
    """Micro-batches per optimizer step and rank.

    Raises:
        ConfigError: ``global_batch_size`` is no multiple of what one pass of all ranks takes.
    """
    if cfg.global_batch_size is None:
        return cfg.gradient_accumulation_steps or 1
    per_pass = cfg.batch_size * data_size
    if cfg.global_batch_size % per_pass:
        raise ConfigError(
            f"global_batch_size={cfg.global_batch_size}: not a multiple of batch_size {cfg.batch_size} x "
            f"{data_size} data-parallel ranks = {per_pass}; change one of them"
        )
    return cfg.global_batch_size // per_pass


def build_loader(key: str, section: Section, cfg: TrainConfig, world: World, tokenizer: Any) -> BatchLoader:
    """The loader of a ``dataset`` or ``dataset_val`` section.

    Training batches are shuffled as ``shuffle`` says and the incomplete last global batch is dropped; validation reads
    every row once, in order. Padding is an own document without labels, so its token id does not matter.

    Raises:
        ConfigError: as the dataset's component and :class:`~lrdint_tune.training.data.BatchLoader` do.
    """
    training = key == "dataset"
    options = {name: value for name, value in section.items() if name != "packed"}
    packed = section.get("packed", False)
    if not isinstance(packed, bool):
        raise ConfigError(f"{key}.packed={packed!r}: must be true or false")
    try:
        with main_process_first():
            dataset = build(key, options, tokenizer, max_seq_len=cfg.max_seq_len)
    except ConfigError as error:  # a dataset does not know in which section it stands
        message = str(error)
        if message.startswith("dataset."):
            message = key + message.removeprefix("dataset")
        raise ConfigError(message) from error
    return BatchLoader(
        dataset,
        batch_size=cfg.batch_size if training else cfg.batch_size_val or cfg.batch_size,
        dp_rank=world.data_rank,
        dp_size=world.data_size,
        shared_by=world.context_size,
        max_seq_len=cfg.max_seq_len,
        packed=packed,
        shuffle=training and cfg.shuffle,
        seed=cfg.seed,
        pad_id=0,
        drop_last=training,
    )


def bad_row_counts(cfg: RunConfig, loader: Any, loader_val: Any) -> dict[str, float]:
    """``data/bad_rows`` and ``data/bad_rows_val``: how many rows the loaders' datasets left out, where
    ``on_bad_row=skip`` says they may."""
    sections = {"data/bad_rows": (cfg.dataset, loader), "data/bad_rows_val": (cfg.dataset_val, loader_val)}
    return {
        tag: source.dataset.bad_rows
        for tag, (section, source) in sections.items()
        if section is not None and section.get("on_bad_row") == "skip"
    }
