"""Whatever this project or the hub calls a model, as a decoder and its tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrdint_tune.errors import ConfigError
from lrdint_tune.export import load_adapter
from lrdint_tune.export.adapter import CONFIG_FILE
from lrdint_tune.models.component import build_from_spec, llama3_2
from lrdint_tune.models.decoder import LlamaDecoder, is_new_tensor
from lrdint_tune.models.hf import iter_hf_folder, spec_from_hf_config, stays_float32
from lrdint_tune.models.hf_config import read_json
from lrdint_tune.models.spec import ModelSpec
from lrdint_tune.training.checkpoint.consolidation import open_checkpoint
from lrdint_tune.training.checkpoint.manifest import STATE_FILE, digest_of
from lrdint_tune.training.components import build_tokenizer
from lrdint_tune.training.config import Section
from lrdint_tune.training.weights import load_weights, materialise, pretrained_tensors

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TOKENIZER = "torchtune.modules.transforms.tokenizers.HuggingFaceBaseTokenizer"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model ready to be evaluated.

    Attributes:
        model: in eval mode, without gradients.
        tokenizer: a torchtune tokenizer.
        tokenizer_section: what it was built from.
        folder: what the weights were read from: the folder given, or the ``step-N`` folder found in it.
        base: the pretrained folder behind an adapter or a checkpoint, None for a whole model.
    """

    model: LlamaDecoder
    tokenizer: Any
    tokenizer_section: Section
    folder: Path
    base: Path | None

    @property
    def weights(self) -> str:
        """A short digest of the weights and of the model's config, read in full: another model, another digest."""
        digest = hashlib.blake2b(digest_size=8)
        # Of a checkpoint its manifest, which has the digests of its shards.
        kinds = ("*.safetensors", "config.json", CONFIG_FILE, STATE_FILE)
        for folder in filter(None, (self.folder, self.base)):
            for file in sorted(file for kind in kinds for file in folder.glob(kind)):
                digest.update(f"{file.name} {digest_of(file)}\n".encode())
        return digest.hexdigest()

    @property
    def tokenizer_digest(self) -> str:
        """A short digest of the tokenizer's section, with the content of its files for their paths."""
        section = {
            option: digest_of(Path(value)) if isinstance(value, str) and Path(value).is_file() else value
            for option, value in self.tokenizer_section.items()
        }
        return hashlib.blake2b(json.dumps(section, sort_keys=True).encode(), digest_size=8).hexdigest()


def load_model(
    path: str | Path,
    *,
    base_model: str | None = None,
    tokenizer: Section | None = None,
    device: torch.device | str = "cpu",
    dtype: str = "fp32",
) -> Loaded:
    """Load a Hugging Face folder of a Llama, a run's ``hf`` or ``adapter`` folder, its output folder (the latest good
    checkpoint, or ``hf`` if none is left) or one ``checkpoints/step-N``.

    Args:
        path: the folder.
        base_model: the pretrained folder of an adapter or a checkpoint, if it is no longer where the run found it.
        tokenizer: a ``_component_`` section; None: ``tokenizer.json`` of the model's folder, or of its base.
        dtype: ``fp32`` or ``bf16``, of weights and computation; λ is float32 in any case.

    Raises:
        ConfigError: the folder is none of these, a file is missing or damaged, or ``base_model`` has no effect.
    """
    folder = Path(path)
    spec, tensors, found, base = _open(folder, base_model)
    section = tokenizer or _tokenizer_section(base or found)
    built = build_tokenizer(section)
    with torch.device("meta"):
        model = build_from_spec(spec)
    _convert(model, DTYPES[dtype])
    materialise(model, torch.device(device))
    load_weights(model, tensors)
    model.requires_grad_(False)
    model.eval()
    if spec.leaks_future:
        log.warning(
            "%s: integral=sequence reads future tokens: its scores are not a language model's, "
            "except those of prefixes alone",
            found,
        )
    return Loaded(model, built, section, found, base)


def _open(folder: Path, base_model: str | None) -> tuple[ModelSpec, Iterable[tuple[str, Tensor]], Path, Path | None]:
    """Spec, all tensors one at a time, the folder that they come from and the pretrained one."""
    if not folder.is_dir():
        raise ConfigError(f"model={str(folder)!r}: no such folder; give {_KINDS}")
    if (folder / CONFIG_FILE).is_file():
        return _open_adapter(folder, base_model)
    if not (folder / "config.json").is_file():
        steps = (folder, *folder.glob("step-*"), *folder.glob("checkpoints/step-*"))
        has_checkpoint = any((step / STATE_FILE).is_file() for step in steps)
        if not has_checkpoint and not (folder / "hf" / "config.json").is_file():
            for host in (folder, folder / "adapter"):
                if (host / HOST_FILE).is_file():
                    raise ConfigError(
                        f"model={str(folder)!r}: {host / HOST_FILE} is of finetune_transformers, whose models are not "
                        "read: load it into its pretrained model with "
                        f"lrdint_tune.hosts.load(model, {str(host)!r}) and evaluate that"
                    )
            raise ConfigError(f"model={str(folder)!r}: holds no model; give {_KINDS}")
        if has_checkpoint:
            checkpoint = open_checkpoint(folder, checkpoint_dir=base_model)
            return checkpoint.spec, checkpoint.tensors(), checkpoint.path, Path(checkpoint.source)
        folder = folder / "hf"
    if base_model is not None:
        raise ConfigError(f"base_model={base_model!r}: has no effect, {folder} is a whole model; remove it")
    spec = _spec_of(folder)
    return spec, iter_hf_folder(folder, spec), folder, None


HOST_FILE = "method.json"  # lrdint_tune.hosts.saving.CONFIG_FILE, whose import would bring transformers
_KINDS = (
    "a Hugging Face folder of a Llama, an adapter folder, a run's output_dir or one of its checkpoints/step-N folders"
)


def _spec_of(folder: Path) -> ModelSpec:
    with torch.device("meta"):
        return llama3_2(**spec_from_hf_config(folder)).spec


def _open_adapter(
    folder: Path, base_model: str | None
) -> tuple[ModelSpec, Iterable[tuple[str, Tensor]], Path, Path | None]:
    config = read_json(folder / CONFIG_FILE)
    base = Path(base_model or config.get("base_model_name_or_path", ""))
    if not (base / "config.json").is_file():
        raise ConfigError(
            f"base_model={base_model!r}: {folder} is an adapter of {config.get('base_model_name_or_path')!r}, which is "
            "no Hugging Face folder here; give the pretrained folder as base_model"
        )
    pretrained = _spec_of(base)
    sizes = config.get("base_model")
    if not isinstance(sizes, dict) or "method" not in config:
        raise ConfigError(f"{folder / CONFIG_FILE}: not an adapter that lrdint_tune saved; give {_KINDS}")
    spec = dataclasses.replace(
        pretrained,
        **sizes,
        method=config["method"],
        method_options=config["method_options"],
        adapters=config.get("adapters", []),
    )
    untied = pretrained.tie_word_embeddings and not spec.tie_word_embeddings

    def tensors() -> Iterable[tuple[str, Tensor]]:
        trained = load_adapter(folder, spec)
        yield from trained.items()
        for name, tensor in pretrained_tensors(base, spec, untie_lm_head=untied):
            if name not in trained and not is_new_tensor(name):
                yield name, tensor

    return spec, tensors(), folder, base


def _tokenizer_section(folder: Path) -> Section:
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"model={str(folder)!r}: no tokenizer.json there; copy the tokenizer's files to it, or add a tokenizer "
            "section as in a training config"
        )
    section: Section = {"_component_": _TOKENIZER, "tokenizer_json_path": str(folder / "tokenizer.json")}
    for option, name in (
        ("tokenizer_config_json_path", "tokenizer_config.json"),
        ("generation_config_path", "generation_config.json"),
    ):
        if (folder / name).is_file():
            section[option] = str(folder / name)
    return section


def _convert(model: LlamaDecoder, dtype: torch.dtype) -> None:
    """Set the dtype of a model that has no memory yet; λ stays float32, and so do the buffers (RoPE, schedules)."""
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dtype != dtype and not stays_float32(f"{path}.{name}"):
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
