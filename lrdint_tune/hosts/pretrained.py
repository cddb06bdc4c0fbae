"""From a folder of weights to a model with a method, as one component of a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from lrdint_tune.errors import ConfigError
from lrdint_tune.hosts.architectures import ARCHITECTURES
from lrdint_tune.hosts.attach import attach


def from_pretrained(
    folder: str,
    *,
    architecture: str,
    method: str = "none",
    where: str | None = None,
    adapters: list[dict[str, Any]] | None = None,
    num_labels: int | None = None,
    weights: bool = True,
    **options: Any,
) -> PreTrainedModel:
    """Load a ``transformers`` model in float32 and attach a method.

    Args:
        folder: with ``config.json`` and the weights.
        architecture: the name of the class, see :func:`~lrdint_tune.hosts.attach.attach`.
        method, where, adapters, options: as there.
        num_labels: classes, for classification; None takes the folder's.
        weights: False builds the model on the meta device, without reading any.

    Raises:
        ConfigError: as there; or no such folder, or weights that transformers cannot read.
    """
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"model.architecture={architecture!r}: unknown; choose one of {', '.join(ARCHITECTURES)}")
    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"checkpointer.checkpoint_dir={folder!r}: no config.json there; download the model first")
    classifies = ARCHITECTURES[architecture].task == "classification"
    if num_labels is not None and not classifies:
        raise ConfigError(f"model.num_labels={num_labels}: {architecture} is no classifier; remove it")
    labels = {} if num_labels is None else {"num_labels": num_labels}
    cls = getattr(transformers, architecture)
    config = AutoConfig.from_pretrained(folder, **labels)
    if not isinstance(config, cls.config_class):
        raise ConfigError(
            f"model.architecture={architecture!r}: {folder!r} holds a {config.model_type!r} model; choose its class"
        )
    if weights:
        try:
            model = cls.from_pretrained(folder, config=config, dtype=torch.float32)
        except (OSError, RuntimeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ConfigError(f"checkpointer.checkpoint_dir={folder!r}: {reason}; download the model again") from error
    else:
        with torch.device("meta"):
            model = cls(config)
    return attach(model, method, where=where, adapters=adapters, **options)
