"""The files of a sharded checkpoint: torch's format, with digests, and read without unpickling foreign objects."""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lrdint_tune.training.checkpoint.manifest import digest_of

METADATA_FILE = ".metadata"

_METADATA_CLASSES = {
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
}


@dataclasses.dataclass(frozen=True)
class _Digested(WriteResult):
    """What a rank tells the first one about a tensor that it wrote, with the digest of the file."""

    file_digest: str = ""


class CheckpointWriter(dcp.FileSystemWriter):
    """Writes the shards of all ranks; when they stand, rank 0 learns their digests and publishes the checkpoint.

    Args:
        path: the folder to write to; made here.
        publish: called on rank 0 with file name -> digest, when every file is written and flushed.
    """

    def __init__(self, path: Path, publish: Callable[[dict[str, str]], None]) -> None:
        super().__init__(path, sync_files=True)
        self.publish = publish
        self.written = False  # this rank's part

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy of this rank's tensors in the CPU's memory, so that training can go on while it is written."""
        # torch's own stager does not know quantised tensors (torch 2.13, torchao 0.15).
        return {name: _copied(tensor) for name, tensor in state_dict.items()}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            results = super().write_data(plan, planner).value()
        except RuntimeError as error:
            # torch's zip writer tells of its own confusion; why it could not write stands behind it.
            raise _behind(error) from None
        self.written = True
        names = {result.storage_data.relative_path for result in results}
        digests = {name: digest_of(Path(self.path) / name) for name in names}
        digested: Future[list[WriteResult]] = Future()
        digested.set_result(
            [
                _Digested(r.index, r.size_in_bytes, r.storage_data, digests[r.storage_data.relative_path])
                for r in results
            ]
        )
        return digested

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        digests = {
            result.storage_data.relative_path: result.file_digest
            for of_rank in results
            for result in of_rank
            if isinstance(result, _Digested)
        }
        digests[METADATA_FILE] = digest_of(Path(self.path) / METADATA_FILE)
        self.publish(digests)


class CheckpointReader(dcp.FileSystemReader):
    """Reads a checkpoint: tensors with ``weights_only``, their index with no classes but torch's own for it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of the tensors.

        Raises:
            pickle.UnpicklingError: it holds something else than an index of tensors.
        """
        if self._metadata is None:
            with open(Path(self.path) / METADATA_FILE, "rb") as file:
                self._metadata = _MetadataUnpickler(file).load()
        return self._metadata

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self.read_metadata().state_dict_metadata)

    def stored(self, name: str) -> TensorStorageMetadata:
        """Shape, dtype and parts of a tensor."""
        entry = self.read_metadata().state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)  # all that the unpickler lets pass
        return entry


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _METADATA_CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint's {METADATA_FILE}")
        return super().find_class(module, name)


def read_whole_tensors(reader: CheckpointReader, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, whole CPU tensor), one at a time, put together from however many shards; no process group is needed."""
    for name in names:
        stored = reader.stored(name)
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        with warnings.catch_warnings():  # that there is no process group, which is what no_dist says
            warnings.simplefilter("ignore", UserWarning)
            dcp.load({name: tensor}, storage_reader=reader, no_dist=True)
        yield name, tensor


def _copied(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor):  # the mesh inside a DTensor
        return tensor
    if is_traceable_wrapper_subclass(tensor):  # sharded, quantised or both: what is inside counts
        names, context = tensor.__tensor_flatten__()
        inside = {name: _copied(getattr(tensor, name)) for name in names}
        return type(tensor).__tensor_unflatten__(inside, context, tensor.size(), tensor.stride())
    tensor = tensor.detach()
    return tensor.clone() if tensor.device.type == "cpu" else tensor.to("cpu")


def _behind(error: BaseException) -> BaseException:
    """The operating system's error that led to ``error``, if there is one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return error
