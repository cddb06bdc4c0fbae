"""From the shards of a checkpoint to the adapter folder and the Hugging Face folder, tensor by tensor."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrdint_tune.errors import ConfigError, NotSavedError
from lrdint_tune.export import save_adapter, save_hf_folder
from lrdint_tune.models.component import build_from_spec
from lrdint_tune.models.decoder import is_new_tensor
from lrdint_tune.models.hf import weights_digest
from lrdint_tune.models.spec import ModelSpec
from lrdint_tune.training.checkpoint.folder import CheckpointFolder
from lrdint_tune.training.checkpoint.manifest import STATE_FILE, DamagedCheckpoint, damage, read_manifest
from lrdint_tune.training.checkpoint.state import MODEL
from lrdint_tune.training.checkpoint.storage import CheckpointReader, read_whole_tensors
from lrdint_tune.training.nf4 import rounded_to_nf4, takes_nf4
from lrdint_tune.training.precision import file_dtype
from lrdint_tune.training.weights import pretrained_tensors

log = logging.getLogger(__name__)


def consolidate(checkpoint: Path, output_dir: Path, *, checkpoint_dir: str | None = None) -> None:
    """Write ``output_dir/adapter`` (not for a stock Llama) and ``output_dir/hf``, as the run itself would have.

    One process, no process group, and one whole tensor in memory at a time: trained tensors come from the shards,
    frozen ones from the pretrained folder.

    Args:
        checkpoint: a ``step-N`` folder; or a run's ``checkpoints`` or output folder, for the latest good one.
        output_dir: where to write.
        checkpoint_dir: the pretrained weights; None: where the run found them.

    Raises:
        ConfigError: there is no such checkpoint, a file of it is damaged, the pretrained weights are others than the
            run's, or what is in the way was not saved by this package.
        NotSavedError: the results cannot be written.
    """
    opened = open_checkpoint(checkpoint, checkpoint_dir=checkpoint_dir)
    spec, config = opened.spec, opened.config
    base = config["checkpointer"].get("base_model_name_or_path") or config["checkpointer"]["checkpoint_dir"]
    try:
        if not spec.is_stock:
            save_adapter(
                output_dir / "adapter",
                opened.trained(),
                spec,
                dtypes=opened.dtypes(),
                base_model_name_or_path=base,
                trainable=config["trainable"],
            )
            log.info("saved %s", output_dir / "adapter")
        save_hf_folder(
            output_dir / "hf",
            opened.tensors(),
            spec,
            dtype=file_dtype(config["dtype"]),
            tokenizer_files_from=opened.source,
        )
        log.info("saved %s", output_dir / "hf")
    except OSError as error:
        raise NotSavedError(f"output_dir={str(output_dir)!r}: cannot be written ({error}); make room there") from None


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint, and the pretrained folder that holds what it does not.

    Attributes:
        path: the ``step-N`` folder.
        spec: its model.
        config: the run's keys.
        source: the pretrained folder.
        reader: of the checkpoint's tensors.
        stored: state-dict name -> name in the checkpoint, of the model's tensors.
    """

    path: Path
    spec: ModelSpec
    config: dict[str, Any]
    source: str
    reader: CheckpointReader
    stored: dict[str, str]

    def dtypes(self) -> dict[str, torch.dtype]:
        """State-dict name -> dtype, of what was trained."""
        return {name: self.reader.stored(key).properties.dtype for name, key in self.stored.items()}

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """(state-dict name, whole CPU tensor) of what was trained, one at a time."""
        pairs = read_whole_tensors(self.reader, self.stored.values())
        return ((name.removeprefix(MODEL), tensor) for name, tensor in pairs)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the model, trained or not, one at a time."""
        yield from self.trained()
        yield from _frozen_tensors(self.source, self.spec, self.config, self.stored.keys())


def open_checkpoint(checkpoint: Path, *, checkpoint_dir: str | None = None) -> OpenCheckpoint:
    """Find a good checkpoint (see :func:`find_checkpoint`) and check that the pretrained weights are the run's.

    Args:
        checkpoint_dir: the pretrained weights; None: where the run found them.

    Raises:
        ConfigError: no such checkpoint, a damaged one, or other pretrained weights.
    """
    path, manifest = find_checkpoint(checkpoint)
    config = manifest["config"]
    source = checkpoint_dir or config["checkpointer"]["checkpoint_dir"]
    if weights_digest(source) != manifest["run"]["checkpoint_dir weights"]:
        raise ConfigError(
            f"checkpoint_dir={source!r}: other weights than those {path} was trained from; give that folder"
        )
    reader = CheckpointReader(path)
    try:
        stored = {name.removeprefix(MODEL): name for name in sorted(reader.names) if name.startswith(MODEL)}
    except pickle.UnpicklingError as error:
        raise ConfigError(f"checkpoint={str(path)!r}: {error}; give a checkpoint of lrdint_tune") from None
    return OpenCheckpoint(path, ModelSpec(**manifest["spec"]), config, source, reader, stored)


def find_checkpoint(given: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint meant by ``given`` and its manifest; nothing is moved.

    Raises:
        ConfigError: there is none, or none that is good.
    """
    if (given / STATE_FILE).is_file():
        candidates = [given]
    else:
        places = (CheckpointFolder(folder, keep_last_n=1) for folder in (given, given / "checkpoints"))
        candidates = [place.of(step) for place in places for step in reversed(place.steps())]
    problems = []
    for path in candidates:
        try:
            manifest = read_manifest(path)
            found = (damage(path, name, *entry) for name, entry in manifest["files"].items())
            problem = next((harm.what for harm in found if harm is not None), None)
        except DamagedCheckpoint as error:
            problem = str(error)
        if problem is None:
            return path, manifest
        problems.append(f"{path.name} is damaged: {problem}")
        log.warning("%s", problems[-1])
    raise ConfigError(
        f"checkpoint={str(given)!r}: {'; '.join(problems) or 'holds no checkpoint'}; give a step-N folder or a run's "
        "output folder"
    )


def _frozen_tensors(
    folder: str, spec: ModelSpec, config: dict[str, Any], trained: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """What the checkpoint does not hold, as the run computed with it."""
    rounded: set[str] = set()
    if config["quantize_base"] == "nf4":
        with torch.device("meta"):
            linears = build_from_spec(spec).base_linears()
        rounded = {f"{name}.weight" for name, linear in linears.items() if takes_nf4(linear)}
    for name, tensor in pretrained_tensors(folder, spec, untie_lm_head=config["untie_lm_head"]):
        if name in trained or is_new_tensor(name):
            continue
        yield name, rounded_to_nf4(tensor, file_dtype(config["dtype"])) if name in rounded else tensor
