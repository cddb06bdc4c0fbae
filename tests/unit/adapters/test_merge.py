"""Merged equals unmerged, unmerging gives the same bits back, and what is not linear is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from lrdint_tune.adapters import attach, attached, merge_adapters, unmerge_adapters
from lrdint_tune.adapters.lora import LoRA
from lrdint_tune.errors import ConfigError
from lrdint_tune.export import plan_export, save_hf_folder
from lrdint_tune.models import LlamaDecoder
from tests.common.adapters import ALL, EACH, LINEAR, wake_adapters
from tests.common.folders import SIZES, assert_equal_states, random_model
from tests.common.models import TINY, tiny_model

X = torch.arange(40).view(2, 20)


def awake(**options: Any) -> LlamaDecoder:
    model = tiny_model(**options)
    wake_adapters(model)
    return model


@pytest.mark.parametrize("method", ["none", "dint"])
@pytest.mark.parametrize("adapters", [EACH["lora"], EACH["rslora"], EACH["quanta"], LINEAR], ids=str)
def test_merged_equals_unmerged(method: str, adapters: list[dict[str, Any]]) -> None:
    model = awake(method=method, adapters=adapters)
    before, spec = copy.deepcopy(model.state_dict()), model.spec
    logits = model(X)
    merge_adapters(model)
    torch.testing.assert_close(model(X), logits, rtol=1e-4, atol=1e-5)
    plain = tiny_model(method=method)
    plain.load_state_dict(model.state_dict())
    assert (plain.state_dict().keys(), plain.spec) == (model.state_dict().keys(), model.spec)
    assert torch.equal(plain(X), model(X))
    plan_export(model.state_dict(), model.spec)

    merge_adapters(model)  # nothing is left to merge
    unmerge_adapters(model)
    assert_equal_states(model.state_dict(), before)
    assert model.spec == spec
    assert torch.equal(model(X), logits)


def test_merging_bfloat16_rounds_once() -> None:
    model = awake(adapters=LINEAR).bfloat16()
    layer = model.layers[0].mlp.w2
    lora, quanta = (copy.deepcopy(attached(layer)[kind]).float() for kind in ("lora", "quanta"))
    exact = layer.weight.float() + lora.delta_weight() + quanta.delta_weight()
    merge_adapters(model)
    assert torch.equal(layer.weight, exact.bfloat16())


def test_dropout_has_no_part_in_a_merged_model() -> None:
    model = awake(adapters=[{**LINEAR[0], "lora_dropout": 0.5}]).eval()
    logits = model(X)
    model.train()
    assert (model(X) - logits).abs().max() > 1e-3
    merge_adapters(model)
    torch.testing.assert_close(model(X), logits, rtol=1e-4, atol=1e-5)


def test_a_merged_model_can_be_copied() -> None:
    model = awake(adapters=LINEAR)
    before = copy.deepcopy(model.state_dict())
    merge_adapters(model)
    merged = copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(model)
    unmerge_adapters(twin)
    assert_equal_states(twin.state_dict(), before)
    assert_equal_states(model.state_dict(), merged)


def test_bottleneck_is_refused_and_nothing_is_merged() -> None:
    model = awake(adapters=ALL)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=r"adapters\.bottleneck: layers\.0\.mlp .*not linear"):
        merge_adapters(model)
    assert_equal_states(model.state_dict(), before)


def test_nothing_is_attached_to_a_merged_module() -> None:
    model = awake(adapters=EACH["lora"])
    merge_adapters(model)
    with pytest.raises(RuntimeError, match="unmerge_adapters"):
        attach(model.layers[0].attn.q_proj, "second", LoRA(TINY["embed_dim"], 32))


def test_merged_model_is_a_stock_llama_elsewhere(tmp_path: Path) -> None:
    """The logits of transformers' Llama: the updates of queries and keys meet the other order of RoPE."""
    model = random_model(adapters=LINEAR)
    tokens = torch.randint(SIZES["vocab_size"], (2, 16))
    wake_adapters(model, std=0.1)
    with torch.no_grad():
        logits = model(tokens)
        merge_adapters(model)
        save_hf_folder(tmp_path / "hf", model.state_dict().items(), model.spec, dtype=torch.float32)
        stock = LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
        torch.testing.assert_close(stock(tokens).logits, logits, rtol=1e-3, atol=1e-4)
