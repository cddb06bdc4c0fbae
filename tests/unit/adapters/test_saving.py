"""Adapters in Hugging Face folders and in adapter folders: names, element order, and mismatches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrdint_tune.adapters import attached, merge_adapters
from lrdint_tune.errors import ConfigError
from lrdint_tune.export import load_adapter, plan_export, save_hf_folder
from lrdint_tune.models import LlamaDecoder, llama3_1_70b, llama3_2
from lrdint_tune.models.decoder import is_new_tensor
from lrdint_tune.models.hf import (
    check_hf_config,
    hf_to_tune,
    iter_hf_folder,
    spec_from_hf_config,
    state_shapes,
    to_hf,
    to_tune,
    tune_to_hf,
)
from tests.common.adapters import ALL, LINEAR, wake_adapters
from tests.common.folders import assert_equal_states, random_model, save_tensors, stock_folder

TOKENS = torch.arange(40).view(2, 20)


def adapted(method: str = "none", adapters: list[dict[str, Any]] = ALL, **options: Any) -> LlamaDecoder:
    model = random_model(method, adapters=adapters, **options)
    wake_adapters(model)
    return model


def save(folder: Path, model: LlamaDecoder) -> Path:
    save_hf_folder(folder, model.state_dict().items(), model.spec, dtype=torch.float32)
    return folder


@pytest.mark.parametrize("method", ["none", "dint"])
def test_every_tensor_goes_there_and_back(method: str) -> None:
    model = adapted(method)
    state = model.state_dict()
    assert state_shapes(model.spec) == {name: tuple(t.shape) for name, t in state.items()}
    hf_names = set()
    for name, tensor in state.items():
        hf_name, moved = to_hf(name, tensor, model.spec)
        assert (tune_to_hf(name, model.spec), hf_to_tune(hf_name, model.spec)) == (hf_name, name)
        assert torch.equal(to_tune(hf_name, moved, model.spec)[1], tensor)
        hf_names.add(hf_name)
    assert len(hf_names) == len(state)
    assert "model.layers.1.self_attn.o_proj.adapters.lora.a.weight" in hf_names
    assert "model.layers.0.mlp.down_proj.adapters.quanta.tensors.0_2" in hf_names
    assert "model.layers.0.mlp.adapters.bottleneck.up.bias" in hf_names


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.attn.q_proj.adapters.dora.a.weight",
        "layers.0.attn.q_proj.adapters.quanta.tensors.0_1",
        "layers.0.attn.adapters.lora.a.weight",
        "layers.2.attn.q_proj.adapters.lora.a.weight",
    ],
)
def test_a_tensor_without_a_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no such tensor"):
        tune_to_hf(name, adapted(adapters=LINEAR[:1]).spec)


@pytest.mark.parametrize("path", ["attn.q_proj", "attn.k_proj", "attn.v_proj"])
def test_exported_lora_is_the_update_of_the_exported_weight(path: str) -> None:
    """Its rows are reordered where the weight's are."""
    model = adapted(adapters=LINEAR[:1])
    state, name = model.state_dict(), f"layers.1.{path}"
    lora = attached(model.get_submodule(name))["lora"]
    weight, a, b = (
        to_hf(f"{name}.{tail}", state[f"{name}.{tail}"].clone(), model.spec)[1]
        for tail in ("weight", "adapters.lora.a.weight", "adapters.lora.b.weight")
    )
    spec = model.spec
    merge_adapters(model)
    _, merged = to_hf(f"{name}.weight", model.get_submodule(name).weight, spec)
    torch.testing.assert_close(weight + lora.scale * b @ a, merged.detach())
    assert torch.equal(b, lora.b.weight) == (path == "attn.v_proj")


@pytest.mark.parametrize("method", ["none", "dint"])
def test_folder_round_trip(tmp_path: Path, method: str) -> None:
    model = adapted(method)
    save(tmp_path / "hf", model)
    arguments = spec_from_hf_config(tmp_path / "hf")
    loaded = llama3_2(**arguments).eval()
    assert loaded.spec.adapters == model.spec.adapters
    check_hf_config(tmp_path / "hf", loaded.spec)
    loaded.load_state_dict(dict(iter_hf_folder(tmp_path / "hf", loaded.spec)))
    assert_equal_states(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == "lrdint_llama", "other libraries would drop the adapters"


def test_adapters_start_from_folders_that_have_none(tmp_path: Path) -> None:
    """A stock Llama, and a model of the same method."""
    stock_folder(tmp_path / "stock")
    save(tmp_path / "dint", random_model("dint"))
    for folder, new in (("stock", is_new_tensor), ("dint", lambda name: ".adapters." in name)):
        model = adapted("dint")
        check_hf_config(tmp_path / folder, model.spec)
        missing, unexpected = model.load_state_dict(dict(iter_hf_folder(tmp_path / folder, model.spec)), strict=False)
        assert not unexpected
        assert set(missing) == set(filter(new, model.state_dict()))
    save(tmp_path / "lora", adapted(adapters=LINEAR))
    model = adapted("dint", LINEAR)
    check_hf_config(tmp_path / "lora", model.spec)
    missing, _ = model.load_state_dict(dict(iter_hf_folder(tmp_path / "lora", model.spec)), strict=False)
    assert missing and all(".attn.method." in name for name in missing)


def test_incomplete_folder_is_refused(tmp_path: Path) -> None:
    model = adapted()
    file = save(tmp_path / "hf", model) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.adapters.bottleneck.up.bias"]
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=r"no tensor 'model\.layers\.1\.mlp\.adapters\.bottleneck\.up\.bias'"):
        iter_hf_folder(tmp_path / "hf", model.spec)


def test_everything_on_a_70b_model_on_the_meta_device_has_a_name() -> None:
    adapters = [{**LINEAR[1], "dims": [32, 32, 32]}, *ALL[::2]]
    with torch.device("meta"):
        model = llama3_1_70b(method="dint", adapters=adapters)
    plan = plan_export(model.state_dict(), model.spec)
    assert len(set(plan.values())) == len(model.state_dict()) == 80 * (9 + 5 + 7 * (2 + 3) + 4) + 3


# ---------------------------------------------------------------------------------------------- adapter folders


def save_new(folder: Path, model: LlamaDecoder) -> dict[str, Tensor]:
    new = {name: t for name, t in model.state_dict().items() if is_new_tensor(name)}
    save_tensors(folder, new, model.spec)
    return new


@pytest.mark.parametrize("method", ["none", "dint"])
def test_base_and_adapter_folder_are_the_trained_model(tmp_path: Path, method: str) -> None:
    trained, other = adapted(method), adapted(method)
    save_new(tmp_path / "adapter", trained)
    base = {name: t for name, t in trained.state_dict().items() if not is_new_tensor(name)}
    loaded = load_adapter(tmp_path / "adapter", other.spec)
    other.load_state_dict({**base, **loaded})
    assert torch.equal(other(TOKENS), trained(TOKENS))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["adapters"] == trained.spec.adapters
    assert "self_attn" in config["target_modules"] or method == "none"
    assert {"mlp", "q_proj", "down_proj"} <= set(config["target_modules"])


CHANGED: list[tuple[list[dict[str, Any]], list[str]]] = [
    (LINEAR[1:], ["['lora', 'quanta']", "['quanta']"]),
    ([], ["['lora', 'quanta']", "[]"]),
    ([{**LINEAR[0], "lora_alpha": 7}, LINEAR[1]], ["adapters.lora.lora_alpha=5", "7"]),
    ([{**LINEAR[0], "use_rslora": True}, LINEAR[1]], ["adapters.lora.use_rslora=False", "True"]),
    ([{**LINEAR[0], "target_modules": ["q_proj"]}, LINEAR[1]], ["adapters.lora.target_modules=", "['q_proj']"]),
    ([LINEAR[0], {**LINEAR[1], "dims": [4, 12]}], ["adapters.quanta.dims=[3, 4, 4]", "[4, 12]"]),
]


@pytest.mark.parametrize(("adapters", "parts"), CHANGED, ids=[" ".join(parts) for _, parts in CHANGED])
def test_other_adapters_are_refused_by_name(tmp_path: Path, adapters: list[dict[str, Any]], parts: list[str]) -> None:
    model = adapted(adapters=LINEAR)
    save_new(tmp_path / "adapter", model)
    save(tmp_path / "hf", model)
    other = random_model(adapters=adapters)
    for read in (
        lambda: load_adapter(tmp_path / "adapter", other.spec),
        lambda: check_hf_config(tmp_path / "hf", other.spec),
    ):
        with pytest.raises(ConfigError) as caught:
            read()
        assert "\n" not in str(caught.value)
        assert all(part in str(caught.value) for part in ["config.json", *parts]), caught.value


def test_order_of_adapters_and_targets_does_not_matter(tmp_path: Path) -> None:
    model = adapted(adapters=LINEAR)
    save_new(tmp_path / "adapter", model)
    turned = [{**entry, "target_modules": entry["target_modules"][::-1]} for entry in LINEAR[::-1]]
    other = random_model(adapters=turned)
    other.load_state_dict({**model.state_dict(), **load_adapter(tmp_path / "adapter", other.spec)})
    torch.testing.assert_close(other(TOKENS), model(TOKENS))
