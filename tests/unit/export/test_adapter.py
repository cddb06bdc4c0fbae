"""Adapter folders: base + adapter is the trained model, and an adapter of another model is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lrdint_tune.errors import ConfigError
from lrdint_tune.export import load_adapter, save_adapter
from lrdint_tune.models import LlamaDecoder
from lrdint_tune.models.decoder import is_new_tensor
from lrdint_tune.models.hf import to_hf
from tests.common.folders import SIZES, assert_equal_states, random_model, save_tensors

METHODS: list[dict[str, Any]] = [
    {"method": "dint", "lam": "annealed", "anneal_steps": 7},
    {"method": "diff", "rank": None},
    {"method": "dint", "rank": 2, "factors": "shared", "lam_sharing": "layer"},
]


def _save(folder: Path, model: LlamaDecoder, trained_base: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    new = {name: t for name, t in model.state_dict().items() if is_new_tensor(name)}
    save_tensors(
        folder,
        new | (trained_base or {}),
        model.spec,
        base_model_name_or_path="meta-llama/Llama-3.2-1B",
        trainable=["adapter", "attention"] if trained_base else ["adapter"],
    )
    return new


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_round_trip_of_the_new_tensors(tmp_path: Path, options: dict[str, Any]) -> None:
    model = random_model(**options)
    if options.get("lam") == "annealed":
        model.advance_schedule(5)
    new = _save(tmp_path / "adapter", model)
    loaded = load_adapter(tmp_path / "adapter", model.spec)
    assert_equal_states(loaded, new)
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert_equal_states(stored, dict(to_hf(name, tensor, model.spec) for name, tensor in new.items()))
    assert stored["model.layers.0.self_attn.method.lam.value"].dtype == torch.float32
    if options.get("lam") == "annealed":
        assert loaded["layers.1.attn.method.lam.step"].tolist() == [5.0]


def test_base_and_adapter_are_the_trained_model(tmp_path: Path) -> None:
    pretrained, trained = random_model("dint"), random_model("dint")
    changed = {n: t for n, t in trained.state_dict().items() if ".attn." in n and not is_new_tensor(n)}
    trained.load_state_dict({**pretrained.state_dict(), **changed} | trained.adapter_parameters())
    _save(tmp_path / "adapter", trained, changed)
    missing, unexpected = pretrained.load_state_dict(load_adapter(tmp_path / "adapter", trained.spec), strict=False)
    assert not unexpected and not [name for name in missing if ".attn." in name]
    assert_equal_states(pretrained.state_dict(), trained.state_dict())
    tokens = torch.randint(SIZES["vocab_size"], (1, 16))
    with torch.no_grad():
        assert torch.equal(pretrained(tokens), trained(tokens))


def test_bfloat16_factors_and_float32_lambda_keep_their_dtypes(tmp_path: Path) -> None:
    model = random_model("dint")
    for name, parameter in model.adapter_parameters().items():
        if not name.endswith("lam.value"):
            parameter.data = parameter.data.bfloat16()
    assert_equal_states(load_adapter_of(tmp_path, model), _new(model))


def test_config_has_the_names_that_peft_uses(tmp_path: Path) -> None:
    model = random_model("dint", rank=4)
    _save(tmp_path / "adapter", model, {"norm.scale": model.norm.scale, "layers.0.attn.q_proj.weight": _q(model)})
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "meta-llama/Llama-3.2-1B"
    assert (config["peft_type"], config["task_type"], config["r"]) == ("LRDINT", "CAUSAL_LM", 4)
    assert config["inference_mode"] is True and config["target_modules"] == ["self_attn"]
    assert config["modules_to_save"] == ["model.layers.0.self_attn.q_proj", "model.norm"]
    assert config["method"] == "dint" and config["method_options"]["lam_init"] == 0.0
    assert config["trainable"] == ["adapter", "attention"]


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"method": "diff"}, ["method='dint'", "method='diff'"]),
        ({"method": "dint", "rank": 4}, ["rank=8", "rank=4"]),
        ({"method": "dint", "lam": "fixed"}, ["lam='learned'", "lam='fixed'"]),
        ({"method": "dint", "num_layers": 3}, ["num_layers=2", "num_layers=3"]),
        ({"method": "dint", "scale_factor": 32}, ["scale_factor=1", "scale_factor=32"]),
    ],
)
def test_adapter_of_another_model_is_refused(tmp_path: Path, other: dict[str, Any], expected: list[str]) -> None:
    _save(tmp_path / "adapter", random_model("dint"))
    with pytest.raises(ConfigError) as caught:
        load_adapter(tmp_path / "adapter", random_model(**other).spec)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in ["adapter_config.json", *expected])


def test_written_out_default_is_the_same_option(tmp_path: Path) -> None:
    _save(tmp_path / "adapter", random_model("dint"))
    load_adapter(tmp_path / "adapter", random_model("dint", lam_init=0.0, rank=8, max_seq_len=32).spec)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "modules_to_save.safetensors"])
def test_missing_or_damaged_file_is_named(tmp_path: Path, file: str) -> None:
    model = random_model("dint")
    _save(tmp_path / "adapter", model, {"layers.0.attn.q_proj.weight": _q(model)})
    path = tmp_path / "adapter" / file
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with pytest.raises(ConfigError, match=file):
        load_adapter(tmp_path / "adapter", model.spec)
    path.unlink()
    with pytest.raises(ConfigError, match=f"no {file}"):
        load_adapter(tmp_path / "adapter", model.spec)


def test_adapter_of_another_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ConfigError, match="peft_type='LORA'"):
        load_adapter(tmp_path, random_model("dint").spec)


def test_incomplete_or_foreign_tensors_and_leaks_are_not_saved(tmp_path: Path) -> None:
    model = random_model("dint")
    new = _new(model)
    name, tensor = new.popitem()
    with pytest.raises(ValueError, match=name):
        save_tensors(tmp_path / "adapter", new, model.spec)
    with pytest.raises(ValueError, match="lora"):
        save_tensors(tmp_path / "adapter", {**new, name: tensor, "lora": tensor}, model.spec)
    with pytest.raises(ValueError, match="never written"):
        every = {**new, name: tensor}
        save_adapter(
            tmp_path / "adapter",
            new.items(),
            model.spec,
            dtypes={key: value.dtype for key, value in every.items()},
            base_model_name_or_path="base",
            trainable=["adapter"],
        )
    leaking = random_model("dint", integral="sequence", allow_future_leak=True)
    with pytest.raises(ConfigError, match="integral='sequence'"):
        save_tensors(tmp_path / "adapter", _new(leaking), leaking.spec)
    assert not list(tmp_path.iterdir())


def load_adapter_of(tmp_path: Path, model: LlamaDecoder) -> dict[str, Tensor]:
    _save(tmp_path / "adapter", model)
    return load_adapter(tmp_path / "adapter", model.spec)


def _new(model: LlamaDecoder) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if is_new_tensor(name)}


def _q(model: LlamaDecoder) -> Tensor:
    return model.state_dict()["layers.0.attn.q_proj.weight"]
