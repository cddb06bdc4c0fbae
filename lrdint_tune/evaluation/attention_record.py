"""What one look at a model's attention found, as a JSON file: numbers per layer and head, and some heat maps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.attention_maps import LayerStatistics, probe_layers
from lrdint_tune.evaluation.heat_map import pack
from lrdint_tune.models.decoder import LlamaDecoder

LAYERS_SHOWN = 3
STEP_FILES = "step-*.json"
RUN_FILE = "run.json"  # beside them: the run's config, and where its curves are


def shown(num_layers: int, num_heads: int, heads_shown: int) -> dict[int, list[int]]:
    """Layer -> heads whose heat maps are kept: the first, the middle and the last layer, heads spread evenly."""
    layers, heads = spread(num_layers, LAYERS_SHOWN), spread(num_heads, heads_shown)
    return {layer: heads for layer in layers} if heads else {}


def spread(count: int, wanted: int) -> list[int]:
    """``wanted`` of ``0 .. count - 1`` as evenly spaced as it goes, the first and the last among them."""
    if wanted < 2:
        return [0][:wanted]
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)})


def look(model: LlamaDecoder, tokens: Tensor, *, top_k: int, heads_shown: int) -> list[LayerStatistics]:
    """:func:`~lrdint_tune.evaluation.attention_maps.probe_layers` with the heat maps that are shown."""
    heads = shown(model.spec.num_layers, model.spec.num_heads, heads_shown)
    return probe_layers(model, tokens, top_k, heat_maps=heads)


def as_record(model: LlamaDecoder, layers: Sequence[LayerStatistics], **facts: Any) -> dict[str, Any]:
    """JSON-able: ``facts``, the method, ``layers``, and ``heat_maps`` as ``layers.N/head.M`` -> packed map."""
    return {
        **facts,
        "method": model.spec.method,
        "layers": [layer.as_dict() for layer in layers],
        "heat_maps": {
            f"layers.{i}/head.{head}": pack(weights)
            for i, layer in enumerate(layers)
            for head, weights in layer.heat_maps.items()
        },
    }


def step_files(folder: Path) -> dict[int, Path]:
    """Step -> file of those in a run's ``attention`` folder, in order."""
    found = {int(file.stem.split("-")[1]): file for file in folder.glob(STEP_FILES)}
    return dict(sorted(found.items()))


def read_record(file: Path) -> dict[str, Any]:
    """Raises ConfigError if it is no such file."""
    try:
        record = json.loads(file.read_text())
        if record["layers"] and "effective" in record["layers"][0]:
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"{file}: is no record of attention statistics; give an attention/step-N.json of a run")
