"""``config.json`` of a Hugging Face folder, from and to the sizes of a model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lrdint_tune import __version__
from lrdint_tune.attention import METHODS, method_options
from lrdint_tune.errors import ConfigError
from lrdint_tune.models.spec import ModelSpec

MODEL_TYPE = "llama"
METHOD_MODEL_TYPE = "lrdint_llama"
ENTRY = "lrdint_tune"
FORMAT_VERSION = 1

# spec field -> config.json key, for the sizes that are spelled the same way by every version of transformers
_SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "embed_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
}
# The constants of torchtune's Llama3ScaledRoPE; only the factor differs between models.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_KEYS = {
    **_SIZES,
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "rope_base": "rope_theta",
    "scale_factor": "RoPE scaling factor",
}
# A model can be built shorter or longer than the pretrained one without touching a weight.
_NOT_COMPARED = ("max_seq_len", "method", "method_options", "adapters")


def spec_from_hf_config(path: str | Path) -> dict[str, Any]:
    """The arguments of the component builder ``llama3_2`` that rebuild the model of a Hugging Face folder.

    Args:
        path: the folder.

    Returns:
        All sizes, ``method`` and the options of the method (``none`` and no options for a folder of a stock Llama), and
        ``adapters`` if there are any.

    Raises:
        ConfigError: no folder or ``config.json``, invalid JSON, another architecture than Llama's, or a kind of RoPE
            scaling other than llama3's.
    """
    folder = Path(path)
    config = _read(folder)
    _require_llama(folder, config)
    spec = {field: _get(folder, config, key) for field, key in _SIZES.items()}
    heads = spec["num_heads"]
    spec["num_kv_heads"] = config.get("num_key_value_heads") or heads
    spec["head_dim"] = config.get("head_dim") or spec["embed_dim"] // heads
    spec["max_seq_len"] = config.get("max_position_embeddings", 2048)
    spec["norm_eps"] = config.get("rms_norm_eps", 1e-6)
    spec["tie_word_embeddings"] = bool(config.get("tie_word_embeddings", False))
    spec["rope_base"], spec["scale_factor"] = _rope(folder, config)
    method, options = _method(folder, config)
    adapters = _adapters(config)
    return {**spec, "method": method, **options, **({"adapters": adapters} if adapters else {})}


def check_hf_config(path: str | Path, spec: ModelSpec) -> None:
    """Compare a Hugging Face folder's ``config.json`` with the model that is to receive its weights.

    A stock Llama's folder fits every method (the new tensors keep their start values); a folder with a method's
    tensors fits the same method with the same options, and one with adapters fits the same adapters.

    Raises:
        ConfigError: the two disagree (the message names the key and both values), or as :func:`spec_from_hf_config`.
    """
    folder = Path(path)
    config = _read(folder)
    found = spec_from_hf_config(folder)
    for field in (f for f in spec.__dataclass_fields__ if f not in _NOT_COMPARED):
        if not _same(found[field], getattr(spec, field)):
            key = _KEYS.get(field, field)
            raise ConfigError(
                f"{folder / 'config.json'}: {key}={found[field]!r} but the model has {field}={getattr(spec, field)!r}; "
                "choose the model builder that belongs to these weights"
            )
    method, options = _method(folder, config)
    if method != "none":
        compare_method(folder / "config.json", method, options, spec)
    if _adapters(config):
        compare_adapters(folder / "config.json", _adapters(config), spec)


def hf_config(spec: ModelSpec) -> dict[str, Any]:
    """The content of ``config.json`` for a model.

    RoPE is written in both spellings, ``rope_parameters`` (transformers 5) and ``rope_theta`` with ``rope_scaling``
    (transformers 4 and other runtimes, which would otherwise fall back to a base of 10000 without a word). A model
    with new tensors is no stock Llama: its ``model_type`` makes the Auto classes refuse it and its
    ``attn_implementation`` makes ``LlamaForCausalLM`` refuse it, where either would drop the new tensors with a
    warning.
    """
    llama3 = {"rope_type": "llama3", "factor": float(spec.scale_factor), **_LLAMA3_ROPE}
    scaling = llama3 if spec.scale_factor != 1 else None
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": MODEL_TYPE,
        **{key: getattr(spec, field) for field, key in _SIZES.items()},
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_seq_len,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": float(spec.rope_base),
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": float(spec.rope_base), **(scaling or {"rope_type": "default"})},
        "tie_word_embeddings": spec.tie_word_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        # Unlike an absent key, null does not claim transformers' defaults, which are Llama 2's.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        ENTRY: {
            "format": FORMAT_VERSION,
            "version": __version__,
            "method": spec.method,
            "method_options": full_options(spec),
            "adapters": spec.adapters,
        },
    }
    if not spec.is_stock:
        config["architectures"] = ["LrdintLlamaForCausalLM"]
        config["model_type"] = METHOD_MODEL_TYPE
        config["attn_implementation"] = "lrdint"
    return config


def full_options(spec: ModelSpec) -> dict[str, Any]:
    """The method's options with every default written out, so that a saved model does not depend on later defaults."""
    options = {**method_options(spec.method), **spec.method_options}
    return METHODS[spec.method].full_options(spec.shape, options)


def compare_method(file: Path, method: str, options: dict[str, Any], spec: ModelSpec) -> None:
    """Compare the method recorded in ``file`` with the model's.

    Raises:
        ConfigError: another method or another value of an option; the message names both.
    """
    if method != spec.method:
        raise ConfigError(
            f"{file}: holds the tensors of method={method!r} but the model has method={spec.method!r}; "
            f"build the model with method={method}"
        )
    mine = full_options(spec)
    for key in sorted(mine.keys() | options.keys()):
        if options.get(key) != mine.get(key):
            raise ConfigError(
                f"{file}: {key}={options.get(key)!r} but the model has {key}={mine.get(key)!r}; "
                f"build the model with {key}={options.get(key)}"
            )


def compare_adapters(file: Path, adapters: list[dict[str, Any]], spec: ModelSpec) -> None:
    """Compare the adapters recorded in ``file`` with the model's.

    Raises:
        ConfigError: another type of adapter or another value of an option; the message names both.
    """
    theirs, mine = ({entry["type"]: entry for entry in entries} for entries in (adapters, spec.adapters))
    if theirs.keys() != mine.keys():
        raise ConfigError(
            f"{file}: holds adapters={list(theirs)} but the model has adapters={list(mine)}; build the model with the "
            "adapters of the file"
        )
    for kind, entry in theirs.items():
        for key in sorted(entry.keys() | mine[kind].keys()):
            if entry.get(key) != mine[kind].get(key):
                raise ConfigError(
                    f"{file}: adapters.{kind}.{key}={entry.get(key)!r} but the model has {mine[kind].get(key)!r}; "
                    "build the model with the adapters of the file"
                )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); check the path and its permissions") from error
    except ValueError as error:
        raise ConfigError(f"{file}: not valid JSON ({error}); download or save the folder again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: not a JSON object; download or save the folder again")
    return content


def _read(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ConfigError(
            f"checkpoint folder {str(folder)!r}: no such folder; download the model with "
            f"`tune download <repo> --output-dir {folder}`"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"checkpoint folder {str(folder)!r}: no config.json; download the model in Hugging Face format with "
            f"`tune download <repo> --output-dir {folder}`"
        )
    return read_json(folder / "config.json")


def _get(folder: Path, config: dict[str, Any], key: str) -> Any:
    if key not in config:
        raise ConfigError(f"{folder / 'config.json'}: no {key}; download or save the folder again")
    return config[key]


def _require_llama(folder: Path, config: dict[str, Any]) -> None:
    required = {
        "model_type": (MODEL_TYPE, METHOD_MODEL_TYPE),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
    }
    for key, values in required.items():
        value = config.get(key, values[0])
        if value not in values:
            raise ConfigError(
                f"{folder / 'config.json'}: {key}={value!r}: not a Llama; use weights with {key}={values[0]}"
            )


def _rope(folder: Path, config: dict[str, Any]) -> tuple[int | float, int | float]:
    """RoPE base and llama3 scaling factor (1: none), from either spelling."""
    new: dict[str, Any] = config.get("rope_parameters") or {}
    old = {**(config.get("rope_scaling") or {}), **{k: config[k] for k in ("rope_theta",) if k in config}}
    both = {key for key in new.keys() & old.keys() if not _same(new[key], old[key])}
    if both:
        key = sorted(both)[0]
        raise ConfigError(
            f"{folder / 'config.json'}: {key}={new[key]!r} in rope_parameters but {old[key]!r} in "
            "rope_theta/rope_scaling; correct the wrong one"
        )
    rope = {**old, **new}
    kind = rope.get("rope_type", rope.get("type", "default"))
    base = _whole(rope.get("rope_theta", 10000.0))
    if kind == "default":
        return base, 1
    if (
        kind != "llama3"
        or "factor" not in rope
        or any(not _same(rope.get(key), value) for key, value in _LLAMA3_ROPE.items())
    ):
        fixed = ", ".join(f"{key}={value:g}" for key, value in _LLAMA3_ROPE.items())
        raise ConfigError(
            f"{folder / 'config.json'}: RoPE scaling {rope} is not supported; use weights without scaling, or with "
            f"rope_type=llama3, {fixed}"
        )
    return base, _whole(rope["factor"])


def _method(folder: Path, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    entry = config.get(ENTRY, {"method": "none", "method_options": {}, "format": FORMAT_VERSION})
    if entry.get("format") != FORMAT_VERSION:
        raise ConfigError(
            f"{folder / 'config.json'}: {ENTRY}.format={entry.get('format')!r}: this version reads {FORMAT_VERSION}; "
            "load the folder with the version of lrdint_tune that wrote it"
        )
    return entry["method"], entry["method_options"]


def _adapters(config: dict[str, Any]) -> list[dict[str, Any]]:
    return config.get(ENTRY, {}).get("adapters", [])


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)) and not isinstance(a, bool):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)


def _whole(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
