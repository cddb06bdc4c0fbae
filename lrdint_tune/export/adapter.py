"""What training changed, without the rest of the model: the new tensors and the trained ones of the base."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrdint_tune import __version__
from lrdint_tune.adapters import MLP
from lrdint_tune.errors import ConfigError
from lrdint_tune.export.atomic import atomic_folder
from lrdint_tune.export.hf_folder import write_json
from lrdint_tune.export.plan import PEFT_TYPE, refuse_foreign_folder, refuse_leak
from lrdint_tune.export.safetensors_file import SafetensorsFile
from lrdint_tune.models.decoder import is_new_tensor
from lrdint_tune.models.hf import hf_to_tune, read_safetensors, state_shapes, to_hf, tune_to_hf
from lrdint_tune.models.hf_config import FORMAT_VERSION, compare_adapters, compare_method, full_options, read_json
from lrdint_tune.models.spec import ModelSpec

ADAPTER_FILE = "adapter_model.safetensors"
BASE_FILE = "modules_to_save.safetensors"
CONFIG_FILE = "adapter_config.json"
# The length of the RoPE cache is no property of the weights.
_NOT_SIZES = ("max_seq_len", "method", "method_options", "adapters")
_SIZES = [f.name for f in dataclasses.fields(ModelSpec) if f.name not in _NOT_SIZES]


def save_adapter(
    directory: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    spec: ModelSpec,
    *,
    dtypes: Mapping[str, torch.dtype],
    base_model_name_or_path: str,
    trainable: list[str],
) -> None:
    """Save the new tensors, and the trained tensors of the base, so that base + folder is the trained model.

    Files: ``adapter_model.safetensors`` (new tensors), ``modules_to_save.safetensors`` (trained tensors of the base,
    if any) and ``adapter_config.json`` (field names as PEFT's). All tensors have Hugging Face names and element order
    and keep their dtype. The folder appears whole or not at all, and replaces one that an earlier save left. One tensor
    is held at a time.

    Args:
        directory: the folder.
        tensors: (state-dict name, whole tensor on any device), each exactly once, in any order: every new tensor of the
            model, buffers included, and those of the pretrained model that were trained.
        spec: the model.
        dtypes: of all of them: state-dict name -> a floating-point dtype.
        base_model_name_or_path: the pretrained model that the adapter belongs to.
        trainable: the run's ``trainable`` groups, for the record.

    Raises:
        ConfigError: the model leaks future tokens, a tensor has no Hugging Face name, or ``directory`` holds
            something that this package did not save.
        ValueError: the tensors are not those of the spec, or not those of ``dtypes``.
    """
    refuse_leak(spec)
    refuse_foreign_folder(directory)
    shapes = state_shapes(spec)
    new = {name for name in shapes if is_new_tensor(name)}
    trained_base = sorted(dtypes.keys() - new)
    wrong = (new - dtypes.keys()) | (dtypes.keys() - shapes.keys())
    if wrong:
        raise ValueError(f"tensor {min(wrong)!r} is missing among the new tensors, or is none of this model's")
    with atomic_folder(directory) as folder, ExitStack() as stack:

        def open_file(name: str, holds: Iterable[str]) -> SafetensorsFile:
            layout = {tune_to_hf(held, spec): (shapes[held], dtypes[held]) for held in holds}
            return stack.enter_context(SafetensorsFile(folder / name, layout))

        adapter = open_file(ADAPTER_FILE, sorted(new))
        base = open_file(BASE_FILE, trained_base) if trained_base else adapter
        for name, tensor in tensors:
            (adapter if name in new else base).write(*to_hf(name, tensor.detach(), spec))
        write_json(folder / CONFIG_FILE, _config(spec, trained_base, base_model_name_or_path, trainable))


def load_adapter(directory: str | Path, spec: ModelSpec) -> dict[str, Tensor]:
    """Read what :func:`save_adapter` wrote: everything to load over the pretrained weights.

    Args:
        directory: the folder.
        spec: the model that is to receive the tensors.

    Returns:
        State-dict name -> CPU tensor, in the dtype of the file.

    Raises:
        ConfigError: a file is missing or damaged, the adapter belongs to a model of other sizes or to another method,
            other adapters or other options, or a tensor is missing, unexpected or of another shape.
    """
    folder = Path(directory)
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"adapter folder {str(folder)!r}: no {CONFIG_FILE}; give a folder that a training run saved")
    config = read_json(folder / CONFIG_FILE)
    if config.get("peft_type") != PEFT_TYPE or config.get("format") != FORMAT_VERSION:
        raise ConfigError(
            f"{folder / CONFIG_FILE}: peft_type={config.get('peft_type')!r}, format={config.get('format')!r}: expected "
            f"{PEFT_TYPE!r} and {FORMAT_VERSION}; give an adapter that this version of lrdint_tune saved"
        )
    for field in _SIZES:
        if config["base_model"][field] != getattr(spec, field):
            raise ConfigError(
                f"{folder / CONFIG_FILE}: the adapter's model has {field}={config['base_model'][field]!r} but this "
                f"model has {field}={getattr(spec, field)!r}; choose the builder that the adapter was trained with"
            )
    compare_method(folder / CONFIG_FILE, config["method"], config["method_options"], spec)
    compare_adapters(folder / CONFIG_FILE, config.get("adapters", []), spec)
    shapes = state_shapes(spec)
    tensors = _read(folder / ADAPTER_FILE, {n: s for n, s in shapes.items() if is_new_tensor(n)}, spec)
    if config["modules_to_save"]:
        trained = {hf_to_tune(f"{module}.weight", spec) for module in config["modules_to_save"]}
        tensors |= _read(folder / BASE_FILE, {n: shapes[n] for n in trained}, spec)
    return tensors


def _read(file: Path, shapes: Mapping[str, tuple[int, ...]], spec: ModelSpec) -> dict[str, Tensor]:
    if not file.is_file():
        raise ConfigError(f"adapter folder {str(file.parent)!r}: no {file.name}; save or copy the folder again")
    tensors = dict(read_safetensors(file, spec))
    for name in sorted(shapes.keys() ^ tensors.keys()):
        what = "missing" if name in shapes else "unexpected"
        raise ConfigError(f"{file}: tensor {name!r} is {what}; save or copy the folder again")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise ConfigError(
                f"{file}: {name} has shape {list(tensors[name].shape)} but the model expects {list(shape)}; "
                "choose the builder and the method options that the adapter was trained with"
            )
    return tensors


def _config(
    spec: ModelSpec,
    trained_base: Collection[str],
    base_model_name_or_path: str,
    trainable: list[str],
) -> dict[str, Any]:
    options = full_options(spec)
    return {
        "peft_type": PEFT_TYPE,
        "format": FORMAT_VERSION,
        "lrdint_tune_version": __version__,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "r": options.get("rank"),
        "target_modules": _target_modules(spec),
        "modules_to_save": sorted(tune_to_hf(name, spec).removesuffix(".weight") for name in trained_base),
        "method": spec.method,
        "method_options": options,
        "adapters": spec.adapters,
        "trainable": trainable,
        "base_model": {field: getattr(spec, field) for field in _SIZES},
    }


def _target_modules(spec: ModelSpec) -> list[str]:
    """Hugging Face's names of the modules that have new tensors."""
    targets = {"self_attn"} if spec.method != "none" else set()
    for entry in spec.adapters:
        targets |= set(entry.get("target_modules", [MLP]))
    return sorted(targets)
