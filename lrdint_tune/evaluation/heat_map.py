"""Pictures of attention maps: blue for weights above 0, red for those below, white for 0."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# From 0 to the limit; the root of a weight is shown, or all but the largest would be white.
_ABOVE = np.array([[255, 255, 255], [107, 174, 214], [8, 48, 107]], dtype=np.float64)
_BELOW = np.array([[255, 255, 255], [252, 146, 114], [165, 15, 21]], dtype=np.float64)
_STOPS = np.array([0.0, 0.5, 1.0])


def pixels(weights: Any, limit: float | None = None, *, side: int = 256) -> NDArray[np.uint8]:
    """uint8 ``[side', side', 3]``, ``side'`` the multiple of the map's side next to ``side``.

    Args:
        weights: float ``[cells, cells]``, a tensor or an array.
        limit: the size of a weight that has the darkest colour; the largest one's if it is not given.
        side: of the picture, in pixels.
    """
    weights = np.asarray(weights, dtype=np.float64)
    limit = float(np.abs(weights).max()) if limit is None else limit
    share = np.sqrt(np.clip(np.abs(weights) / (limit or 1.0), 0.0, 1.0))
    above, below = (
        np.stack([np.interp(share, _STOPS, colours[:, channel]) for channel in range(3)], axis=-1)
        for colours in (_ABOVE, _BELOW)
    )
    coloured = np.where((weights < 0)[..., None], below, above).round().astype(np.uint8)
    times = max(1, round(side / len(weights)))
    return coloured.repeat(times, axis=0).repeat(times, axis=1)


def data_uri(picture: NDArray[np.uint8]) -> str:
    """The picture as a PNG that needs no file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def pack(weights: Any) -> str:
    """A square map as text for JSON: base64 of little-endian float16, row by row."""
    return base64.b64encode(np.asarray(weights).astype("<f2").tobytes()).decode()


def unpack(text: str) -> NDArray[np.float64]:
    """What :func:`pack` made, float64 ``[cells, cells]``."""
    flat = np.frombuffer(base64.b64decode(text), dtype="<f2").astype(np.float64)
    side = round(len(flat) ** 0.5)
    return flat.reshape(side, side)
