"""Adapters of linear layers and of the MLP, beside any attention method.

The registry maps an adapter's ``type`` in a config to its class, whose keyword-only arguments are its options. LoRaDA
(seed 004) is method ``lmam`` with adapters: -LA with ``lora`` and ``bottleneck``, -A with ``bottleneck``, -Q with
``quanta``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lrdint_tune.adapters.base import Adapter, LinearAdapter, attach, attached
from lrdint_tune.adapters.bottleneck import Bottleneck
from lrdint_tune.adapters.lora import LoRA
from lrdint_tune.adapters.merge import is_merged, merge_adapters, unmerge_adapters
from lrdint_tune.adapters.quanta import QuanTA
from lrdint_tune.errors import ConfigError

ADAPTERS: dict[str, type[Adapter]] = {cls.name: cls for cls in (LoRA, Bottleneck, QuanTA)}
# target_modules by their Hugging Face names -> where they are in a torchtune layer
TARGETS = {
    "q_proj": "attn.q_proj",
    "k_proj": "attn.k_proj",
    "v_proj": "attn.v_proj",
    "o_proj": "attn.output_proj",
    "gate_proj": "mlp.w1",
    "up_proj": "mlp.w3",
    "down_proj": "mlp.w2",
}
MLP = "mlp"


def adapter_options(kind: str) -> dict[str, Any]:
    """The options of the adapter type ``kind`` with their defaults, ``target_modules`` (required) aside."""
    parameters = inspect.signature(ADAPTERS[kind]).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def check_adapters(adapters: Any) -> list[dict[str, Any]]:
    """The builder option ``adapters`` with every default filled in, as plain data.

    Args:
        adapters: None, or a list of mappings, e.g. ``[{type: lora, target_modules: [o_proj], rank: 4}]``.

    Raises:
        ConfigError: anything else, an unknown or a second adapter of one type, an unknown or missing option, or an
            option out of range; the message names the key, its value and the fix.
    """
    if adapters is None:
        return []
    if not isinstance(adapters, (list, tuple)):
        raise ConfigError(
            f"adapters={adapters!r}: must be a list of mappings, e.g. [{{type: lora, target_modules: [q_proj]}}]"
        )
    checked: list[dict[str, Any]] = []
    for i, entry in enumerate(adapters):
        kinds = f"choose one of {', '.join(ADAPTERS)}"
        if not isinstance(entry, Mapping) or "type" not in entry:
            raise ConfigError(f"adapters[{i}]={entry!r}: must be a mapping with a type; {kinds}")
        if entry["type"] not in list(ADAPTERS):
            raise ConfigError(f"adapters[{i}].type={entry['type']!r}: unknown; {kinds}")
        if entry["type"] in [other["type"] for other in checked]:
            raise ConfigError(
                f"adapters[{i}].type={entry['type']!r}: there is one already; put all its target_modules into one entry"
            )
        checked.append(_check(entry))
    return checked


def attach_adapters(layers: Iterable[nn.Module], adapters: Iterable[Mapping[str, Any]]) -> None:
    """Attach checked adapters to each of torchtune's transformer layers, on the device and in the dtype of what they
    adapt.

    Args:
        layers: with ``attn.q_proj`` ... ``mlp.w3``.
        adapters: from :func:`check_adapters`.

    Raises:
        ConfigError: an option that does not fit the sizes of a layer.
    """
    for layer in layers:
        for entry in adapters:
            options = {name: value for name, value in entry.items() if name not in ("type", "target_modules")}
            for path in target_paths(entry):
                module = layer.get_submodule(path)
                like = next(module.parameters())
                with like.device:
                    adapter = ADAPTERS[entry["type"]].for_module(module, **options)
                attach(module, entry["type"], adapter.to(like.dtype) if like.is_floating_point() else adapter)


def target_paths(entry: Mapping[str, Any]) -> list[str]:
    """Where in a torchtune layer a checked adapter is attached."""
    return [TARGETS[target] for target in entry["target_modules"]] if "target_modules" in entry else [MLP]


def named_adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Every attached adapter and its name in ``model``; merged ones are none."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Adapter))


def _check(entry: Mapping[str, Any]) -> dict[str, Any]:
    kind = entry["type"]
    linear = issubclass(ADAPTERS[kind], LinearAdapter)
    defaults = adapter_options(kind)
    valid = (["target_modules"] if linear else []) + list(defaults)
    for name, value in entry.items():
        if name != "type" and name not in valid:
            raise ConfigError(f"adapters.{kind}.{name}={value!r}: no such option; it has {', '.join(valid)}")
    checked = {"type": kind}
    if linear:
        checked["target_modules"] = _check_targets(f"adapters.{kind}.target_modules", entry.get("target_modules"))
    given = {name: list(v) if isinstance(v, tuple) else v for name, v in entry.items() if name in defaults}
    options = {**defaults, **given}
    with torch.device("meta"):  # the constructor checks the values; sizes are checked when the adapter is attached
        _ = ADAPTERS[kind](*((1, 1) if linear else (1,)), **options)
    return {**checked, **options}


def _check_targets(key: str, targets: Any) -> list[str]:
    if not isinstance(targets, (list, tuple)) or not targets:
        raise ConfigError(f"{key}={targets!r}: must be a list of some of {', '.join(TARGETS)}")
    for target in targets:
        if target not in list(TARGETS):
            raise ConfigError(f"{key}: {target!r} is unknown; choose some of {', '.join(TARGETS)}")
    if len(set(targets)) < len(targets):
        raise ConfigError(f"{key}={list(targets)}: a module is listed twice; list it once")
    return [target for target in TARGETS if target in targets]


__all__ = [
    "ADAPTERS",
    "MLP",
    "TARGETS",
    "Adapter",
    "LinearAdapter",
    "adapter_options",
    "attach",
    "attach_adapters",
    "attached",
    "check_adapters",
    "is_merged",
    "merge_adapters",
    "named_adapters",
    "target_paths",
    "unmerge_adapters",
]
