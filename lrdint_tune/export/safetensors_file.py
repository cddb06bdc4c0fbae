"""Writing a safetensors file tensor by tensor, in any order, without holding more than one of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

_DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class SafetensorsFile:
    """A safetensors file whose names, shapes and dtypes are known before its tensors.

    The format is an 8-byte little-endian length, a JSON header that gives each tensor's byte range, and the bytes.
    With the header known, each tensor is written to its place as it comes. (``safetensors.torch.save_file`` wants all
    of them at once, which for a model below the shard size would be a second copy of the model.)

    Args:
        path: the file; overwritten.
        layout: name -> (shape, dtype), floating-point dtypes only.
    """

    def __init__(self, path: Path, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self._missing = dict(layout)
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        # Wide elements first keeps every tensor aligned to its own element size.
        for name, (shape, dtype) in sorted(layout.items(), key=lambda item: -item[1][1].itemsize):
            self._offsets[name] = position
            end = position + num_bytes(shape, dtype)
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._start = 8 + len(encoded)
        self._file = open(path, "wb")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)
        self._file.truncate(self._start + position)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor into the file, converted to the dtype of the layout.

        Raises:
            ValueError: a name that the layout does not have or that was written before, or another shape.
        """
        if name not in self._missing:
            raise ValueError(f"tensor {name!r} is not to be written, or was written before")
        shape, dtype = self._missing.pop(name)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"tensor {name!r} has shape {list(tensor.shape)}, announced was {list(shape)}")
        data = tensor.detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8)
        self._file.seek(self._start + self._offsets[name])
        self._file.write(data.numpy().data)

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file.

        Raises:
            ValueError: a tensor of the layout was never written (only when no other exception is under way).
        """
        self._file.close()
        if kind is None and self._missing:
            raise ValueError(
                f"{len(self._missing)} tensors were never written, the first is {next(iter(self._missing))!r}"
            )


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes that a tensor takes in a file."""
    return torch.Size(shape).numel() * dtype.itemsize
