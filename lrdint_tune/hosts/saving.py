"""A folder with what training changed: the new tensors, the trained tensors of the base, and what they belong to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrdint_tune import __version__
from lrdint_tune.errors import ConfigError
from lrdint_tune.export.atomic import atomic_folder
from lrdint_tune.hosts.architectures import architecture_of
from lrdint_tune.hosts.attach import Attached, attach, attached
from lrdint_tune.hosts.model import method_tensors, state_of

CONFIG_FILE = "method.json"
METHOD_FILE = "method.safetensors"
BASE_FILE = "trained_base.safetensors"
FORMAT_VERSION = 1
_KEYS = ("method", "where", "options", "adapters")


def save(model: PreTrainedModel, folder: str | Path) -> None:
    """Save the method, so that the pretrained model plus the folder is this model.

    Files: ``method.safetensors`` (the new tensors), ``trained_base.safetensors`` (the parameters of the base with
    ``requires_grad``, if any) and ``method.json``. The folder appears whole or not at all, and replaces one that an
    earlier save left. (``model.save_pretrained`` writes weights that transformers loads without the method.)

    Raises:
        ConfigError: no method is attached, or ``folder`` holds something that this function did not save.
    """
    state = state_of(model)
    check_folder(folder)
    new = method_tensors(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in new}
    config = {
        "format": FORMAT_VERSION,
        "lrdint_tune_version": __version__,
        **_describe(model, state),
        "trained_base": sorted(trained),
    }
    with atomic_folder(folder) as partial:
        _write(partial / METHOD_FILE, new)
        if trained:
            _write(partial / BASE_FILE, trained)
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def load(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Load what :func:`save` wrote into ``model``, attaching the method first unless it is attached already.

    Args:
        model: the pretrained model that the folder was trained from.
        folder: the folder.

    Returns:
        ``model``.

    Raises:
        ConfigError: a file is missing or damaged; the folder belongs to another class, to other sizes, or (with a
            method attached) to another method, option or place; or a tensor is missing, unexpected or of another shape.
    """
    folder = Path(folder)
    config = _read_config(folder)
    state = attached(model)
    here = _describe(model, state) if state else _sizes(model)
    for key, value in here.items():
        if config[key] != value:
            raise ConfigError(
                f"{folder / CONFIG_FILE}: {_difference(key, config[key], value)}; load it into the model it was "
                "trained from"
            )
    if state is None:
        attach(model, config["method"], where=config["where"], adapters=config["adapters"], **config["options"])
    tensors = _read(folder / METHOD_FILE, method_tensors(model))
    if config["trained_base"]:
        own = dict(model.named_parameters())
        unknown = [name for name in config["trained_base"] if name not in own]
        if unknown:
            raise ConfigError(f"{folder / CONFIG_FILE}: trained_base={unknown[0]!r}: the model has no such parameter")
        tensors |= _read(folder / BASE_FILE, {name: own[name] for name in config["trained_base"]})
    model.load_state_dict(tensors, strict=False)
    return model


def check_folder(folder: str | Path) -> None:
    """Raise ConfigError for what a save must not replace: a file, or a folder that :func:`save` did not write."""
    folder = Path(folder)
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not empty and not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"folder {str(folder)!r}: exists and was not saved by lrdint_tune.hosts; choose another one")


def _sizes(model: nn.Module) -> dict[str, Any]:
    architecture = architecture_of(model)
    layers = list(architecture.layers(model))
    shape = dataclasses.asdict(layers[0].shape)
    del shape["layer_index"]
    return {"architecture": architecture.name, "num_layers": len(layers), **shape}


def _describe(model: nn.Module, state: Attached) -> dict[str, Any]:
    return {**_sizes(model), **{key: getattr(state, key) for key in _KEYS}}


def _difference(key: str, saved: Any, here: Any) -> str:
    if isinstance(saved, dict) and isinstance(here, dict):
        key = next(name for name in {**saved, **here} if saved.get(name) != here.get(name))
        saved, here = saved.get(key), here.get(key)
    return f"was saved with {key}={saved!r}, the model has {key}={here!r}"


def _write(file: Path, tensors: dict[str, Any]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"folder {str(folder)!r}: no {CONFIG_FILE}; give a folder that a run saved") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}: not JSON ({error}); save or copy the folder again") from None
    if config.get("format") != FORMAT_VERSION:
        raise ConfigError(f"{file}: format={config.get('format')!r}: expected {FORMAT_VERSION}; save it again")
    return config


def _read(file: Path, expected: dict[str, Any]) -> dict[str, Tensor]:
    try:
        tensors = load_file(file)
    except (FileNotFoundError, SafetensorError) as error:
        raise ConfigError(f"{file}: missing or damaged ({error}); save or copy the folder again") from None
    for name in sorted(tensors.keys() ^ expected.keys()):
        what = "missing" if name in expected else "unexpected"
        raise ConfigError(f"{file}: tensor {name!r} is {what}; save or copy the folder again")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ConfigError(
                f"{file}: {name} has shape {list(tensor.shape)}, the model expects {list(expected[name].shape)}; use "
                "the model it was trained from"
            )
    return tensors
