"""A whole model as a Hugging Face folder: sharded safetensors, config.json and the tokenizer's files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrdint_tune.errors import ConfigError
from lrdint_tune.export.atomic import atomic_folder
from lrdint_tune.export.plan import refuse_foreign_folder, refuse_leak
from lrdint_tune.export.safetensors_file import SafetensorsFile, num_bytes
from lrdint_tune.models.hf import INDEX_FILE, WEIGHTS_FILE, hf_config, state_shapes, stays_float32, to_hf, tune_to_hf
from lrdint_tune.models.hf_config import read_json
from lrdint_tune.models.spec import ModelSpec

# Copied when present. The licence goes with the weights: Llama's asks for it.
COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "original/tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
)
_COPIED_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def save_hf_folder(
    directory: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    tokenizer_files_from: str | Path | None = None,
    max_shard_bytes: float = 5e9,
) -> None:
    """Save a model as a folder that :func:`~lrdint_tune.models.hf.iter_hf_folder` reads back bit for bit.

    A model of method ``none`` is an ordinary Llama to every other library; a model with a method's tensors is refused
    by them (see :func:`~lrdint_tune.models.hf_config.hf_config`). The folder appears whole or not at all, and
    replaces one that an earlier save left. One tensor is held at a time.

    Args:
        directory: the folder.
        tensors: (state-dict name, whole tensor on any device), each exactly once, in any order.
        spec: the model.
        dtype: of the file, a floating-point type; lambda is float32 in any case.
        tokenizer_files_from: a folder, usually the pretrained model's, to copy tokenizer, generation and licence
            files from; the ids of the special tokens are taken from its ``config.json``.
        max_shard_bytes: no file is larger unless a single tensor is.

    Raises:
        ConfigError: the model leaks future tokens, a tensor has no Hugging Face name, ``directory`` holds something
            that this package did not save, or ``tokenizer_files_from`` is no folder.
        ValueError: the tensors are not those of the spec.
    """
    refuse_leak(spec)
    refuse_foreign_folder(directory)
    source = None if tokenizer_files_from is None else Path(tokenizer_files_from)
    if source is not None and not source.is_dir():
        raise ConfigError(f"tokenizer_files_from={str(source)!r}: no such folder; give the pretrained model's folder")
    shards = _shards(spec, dtype, max_shard_bytes)
    shard_of = {name: file for file, layout in shards.items() for name in layout}
    with atomic_folder(directory) as folder:
        with ExitStack() as stack:
            files = {
                file: stack.enter_context(SafetensorsFile(folder / file, layout)) for file, layout in shards.items()
            }
            for name, tensor in tensors:
                hf_name, value = to_hf(name, tensor.detach(), spec)
                if hf_name not in shard_of:
                    raise ValueError(f"tensor {name!r} belongs to no model of method {spec.method!r}")
                files[shard_of[hf_name]].write(hf_name, value)
        if len(shards) > 1:
            total = sum(num_bytes(*entry) for layout in shards.values() for entry in layout.values())
            write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": shard_of})
        write_json(folder / "config.json", _config(spec, dtype, source))
        if source is not None:
            _copy_files(source, folder)


def write_json(file: Path, content: Any) -> None:
    """Write ``content`` as readable JSON."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shards(spec: ModelSpec, dtype: torch.dtype, max_shard_bytes: float) -> dict[str, Layout]:
    """File name -> its tensors, filled in the order of the state dict."""
    shards: list[Layout] = [{}]
    size = 0
    for name, shape in state_shapes(spec).items():
        entry = (shape, torch.float32 if stays_float32(name) else dtype)
        if shards[-1] and size + num_bytes(*entry) > max_shard_bytes:
            shards.append({})
            size = 0
        size += num_bytes(*entry)
        shards[-1][tune_to_hf(name, spec)] = entry
    if len(shards) == 1:
        return {WEIGHTS_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def _config(spec: ModelSpec, dtype: torch.dtype, source: Path | None) -> dict[str, Any]:
    # Both spellings: transformers 5 reads dtype, earlier versions and other runtimes torch_dtype.
    name = str(dtype).removeprefix("torch.")
    config = {**hf_config(spec), "dtype": name, "torch_dtype": name}
    if source is not None and (source / "config.json").is_file():
        base = read_json(source / "config.json")
        config |= {key: base[key] for key in _COPIED_KEYS if key in base}
    return config


def _copy_files(source: Path, folder: Path) -> None:
    for name in COPIED_FILES:
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
