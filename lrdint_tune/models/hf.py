"""Weights of a Hugging Face folder, read one tensor at a time into the model's names and order.

The names and the ``config.json`` are the business of :mod:`~lrdint_tune.models.hf_names` and
:mod:`~lrdint_tune.models.hf_config`; what users of the mapping need of them is re-exported here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lrdint_tune.errors import ConfigError
from lrdint_tune.models.component import build_from_spec
from lrdint_tune.models.decoder import is_adapter_tensor, is_new_tensor
from lrdint_tune.models.hf_config import check_hf_config, hf_config, read_json, spec_from_hf_config
from lrdint_tune.models.hf_names import hf_to_tune, stays_float32, to_hf, to_tune, tune_to_hf
from lrdint_tune.models.spec import ModelSpec

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_ROWS_COMPARED = 8192
_DIGEST_SAMPLES = 64


def state_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the state dict of a model with this spec.

    Read off one layer built on the meta device, so that a new method needs no second list of its shapes.
    """
    with torch.device("meta"):
        model = build_from_spec(spec, num_layers=1)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        layer = name.removeprefix("layers.0.")
        names = [name] if layer == name else [f"layers.{i}.{layer}" for i in range(spec.num_layers)]
        shapes.update(dict.fromkeys(names, tuple(tensor.shape)))
    return shapes


def iter_hf_folder(path: str | Path, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """Read the weights of a Hugging Face folder for a model.

    Names and shapes of all tensors are compared with the model before the first one is read, from the files' headers
    alone. The new tensors of a method are either all in the folder or none of them is: then they are not yielded and
    keep their start values. The same holds for those of the adapters.

    Args:
        path: a folder with ``model.safetensors``, or with shards and ``model.safetensors.index.json``.
        spec: the model.

    Returns:
        An iterator over (state-dict name, CPU tensor in the dtype of the file). Each tensor owns its memory and the
        iterator keeps none, so that loading takes one tensor beyond the model. The order depends on the files only.

    Raises:
        ConfigError: no folder or weights, a missing or damaged shard, a tensor that is missing, unexpected, of
            another shape or not of floating point, or an ``lm_head`` that differs from the embedding although the
            model ties them. Each names the file.
    """
    folder = Path(path)
    files = _weight_files(folder)
    shapes = state_shapes(spec)
    expected = {tune_to_hf(name, spec): shape for name, shape in shapes.items()}
    adapters = {tune_to_hf(name, spec) for name in shapes if is_adapter_tensor(name)}
    method = {tune_to_hf(name, spec) for name in shapes if is_new_tensor(name)} - adapters
    found: dict[str, Path] = {}
    for file in files:
        with _open(file) as f:
            for name in f.keys():
                if not _is_rope_cache(name):
                    found[name] = file
                    _check_tensor(file, name, f.get_slice(name), expected, spec)
    absent = {name for group in (method, adapters) if not group & found.keys() for name in group}
    missing = [name for name in expected if name not in found and name not in absent]
    if missing:
        raise ConfigError(
            f"checkpoint folder {str(folder)!r}: no tensor {_first(missing)}; the model and the weights differ, or the "
            "download is incomplete: choose the builder that belongs to these weights or download them again"
        )
    if spec.tie_word_embeddings and _HEAD in found:
        _check_tied(found)
    skipped = {_HEAD} - expected.keys()
    return (pair for file in files for pair in read_safetensors(file, spec, skipped))


def read_safetensors(file: Path, spec: ModelSpec, skipped: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Read one file with Hugging Face names: (state-dict name, CPU tensor that owns its memory), one at a time.

    Args:
        file: the file.
        spec: the model that the tensors belong to.
        skipped: Hugging Face names not to read; precomputed RoPE frequencies, which old folders hold, never are.

    Raises:
        ConfigError: the file is damaged, or holds a tensor that no model with this spec has.
    """
    with _open(file) as f:
        names = f.offset_keys()
    for name in names:
        if name not in skipped and not _is_rope_cache(name):
            yield _read_tensor(file, name, spec)


def _read_tensor(file: Path, name: str, spec: ModelSpec) -> tuple[str, Tensor]:
    # Opened for each tensor: the pages of a mapped file stay in memory until it is closed.
    with _open(file) as f:
        stored = f.get_tensor(name)
    tune_name, tensor = to_tune(name, stored, spec)
    # What safetensors returns is a view of the file: a file replaced later would change it.
    return tune_name, tensor.clone() if tensor.data_ptr() == stored.data_ptr() else tensor


def _is_rope_cache(name: str) -> bool:
    return name.endswith("rotary_emb.inv_freq")


def weights_digest(path: str | Path) -> str:
    """Hexadecimal digest that tells two checkpoints of one architecture apart: files, sizes and samples of the bytes.

    Args:
        path: a Hugging Face folder.

    Raises:
        ConfigError: no weights there.
    """
    digest = hashlib.blake2b(digest_size=8)
    for file in _weight_files(Path(path)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as f:
            for i in range(_DIGEST_SAMPLES):
                f.seek(size * i // _DIGEST_SAMPLES)
                digest.update(f.read(4096))
    return digest.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    download = f"download the model in safetensors format with `tune download <repo> --output-dir {folder}`"
    if not folder.is_dir():
        raise ConfigError(f"checkpoint folder {str(folder)!r}: no such folder; {download}")
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise ConfigError(f"checkpoint folder {str(folder)!r}: no {WEIGHTS_FILE} and no {INDEX_FILE}; {download}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index}: no weight_map; {download}")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ConfigError(
            f"checkpoint folder {str(folder)!r}: {INDEX_FILE} lists {_first(absent)}, not there; {download}"
        )
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file}: damaged or incomplete ({error}); download or save it again") from error


def _check_tensor(file: Path, name: str, header: Any, expected: dict[str, tuple[int, ...]], spec: ModelSpec) -> None:
    if name == _HEAD and spec.tie_word_embeddings:
        shape = expected[_EMBEDDING]
    elif name in expected:
        shape = expected[name]
    else:
        raise ConfigError(
            f"{file}: unexpected tensor {name!r}: the model (method={spec.method!r}, {spec.num_layers} layers) has "
            "none of that name; choose the builder and the method that belong to these weights"
        )
    if tuple(header.get_shape()) != shape:
        raise ConfigError(
            f"{file}: {name} has shape {list(header.get_shape())} but the model expects {list(shape)}; choose the "
            "builder and the method options that belong to these weights"
        )
    if header.get_dtype() not in _FLOATS:
        raise ConfigError(
            f"{file}: {name} is of type {header.get_dtype()}, not floating point; use weights that are not quantised"
        )


def _check_tied(found: dict[str, Path]) -> None:
    """The file's ``lm_head`` must equal its embedding; a few rows at a time, since both can be of a gigabyte."""
    with ExitStack() as stack:
        opened = {file: stack.enter_context(_open(file)) for file in {found[_HEAD], found[_EMBEDDING]}}
        head, embedding = (opened[found[name]].get_slice(name) for name in (_HEAD, _EMBEDDING))
        for start in range(0, head.get_shape()[0], _ROWS_COMPARED):
            rows = slice(start, start + _ROWS_COMPARED)
            if not torch.equal(head[rows].double(), embedding[rows].double()):
                raise ConfigError(
                    f"{found[_HEAD]}: {_HEAD} differs from {_EMBEDDING} but the model ties them; "
                    "build the model with tie_word_embeddings=False"
                )


def _first(names: list[str]) -> str:
    return repr(names[0]) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


__all__ = [
    "INDEX_FILE",
    "WEIGHTS_FILE",
    "check_hf_config",
    "hf_config",
    "hf_to_tune",
    "iter_hf_folder",
    "read_safetensors",
    "spec_from_hf_config",
    "state_shapes",
    "stays_float32",
    "to_hf",
    "to_tune",
    "tune_to_hf",
    "weights_digest",
]
