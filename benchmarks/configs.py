"""Configs as the recipes read them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lrdint_tune.training.config import TrainConfig, load_config


def read_config(file: Path, overrides: Iterable[str]) -> TrainConfig:
    """A YAML file with ``key=value`` overrides. Raises ConfigError."""
    merged = OmegaConf.merge(OmegaConf.load(file), OmegaConf.from_dotlist(list(overrides)))
    assert isinstance(merged, DictConfig)
    return load_config(merged)
