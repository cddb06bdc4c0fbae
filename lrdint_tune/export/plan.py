"""What is checked before training starts, so that a run does not end with a model that cannot be saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from lrdint_tune.errors import ConfigError
from lrdint_tune.models.hf import state_shapes, tune_to_hf
from lrdint_tune.models.hf_config import ENTRY, read_json
from lrdint_tune.models.spec import ModelSpec

PEFT_TYPE = "LRDINT"


def plan_export(
    names_and_shapes: Mapping[str, Tensor | Sequence[int]],
    spec: ModelSpec,
    *,
    output_dirs: Iterable[str | Path] = (),
) -> dict[str, str]:
    """The dry run of every save: what each tensor of the model will be called, and whether it can be saved at all.

    Args:
        names_and_shapes: the model's state dict (meta tensors and DTensors too), or name -> shape.
        spec: the model.
        output_dirs: folders that the run is going to write.

    Returns:
        State-dict name -> Hugging Face name.

    Raises:
        ConfigError: a tensor without a Hugging Face name, one that the spec has and the model lacks or the reverse,
            another shape, a model that leaks future tokens, or an output folder that holds something else.
    """
    refuse_leak(spec)
    expected = state_shapes(spec)
    for name in expected.keys() - names_and_shapes.keys():
        raise ConfigError(f"export: the model has no tensor {name!r}, which method={spec.method!r} should have")
    plan = {}
    for name, value in names_and_shapes.items():
        plan[name] = tune_to_hf(name, spec)
        shape = tuple(value.shape if isinstance(value, Tensor) else value)
        if expected.get(name) != shape:
            raise ConfigError(f"export: tensor {name!r} has shape {list(shape)}, expected {expected.get(name)}")
    for folder in output_dirs:
        refuse_foreign_folder(folder)
    return plan


def refuse_leak(spec: ModelSpec) -> None:
    """Raise ConfigError for a model whose outputs depend on later tokens: its losses are no language-model losses."""
    if spec.leaks_future:
        raise ConfigError(
            "integral='sequence': the model reads future tokens, so it cannot be exported; train with integral=causal"
        )


def refuse_foreign_folder(path: str | Path) -> None:
    """Raise ConfigError for what a save must not replace: a file, or a folder that this package did not write."""
    folder = Path(path)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if (folder / "adapter_config.json").is_file() and read_json(folder / "adapter_config.json").get(
        "peft_type"
    ) == PEFT_TYPE:
        return
    if (folder / "config.json").is_file() and ENTRY in read_json(folder / "config.json"):
        return
    raise ConfigError(f"output folder {str(folder)!r}: exists and was not saved by lrdint_tune; choose another one")
