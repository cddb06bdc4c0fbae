"""A wrong `adapters` entry is refused in one line that names the key, its value and the fix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lrdint_tune.adapters import adapter_options, check_adapters
from lrdint_tune.errors import ConfigError
from lrdint_tune.models import llama_7b
from tests.common.models import tiny_model

QUERY: dict[str, Any] = {"type": "lora", "target_modules": ["q_proj"]}
QUANTA: dict[str, Any] = {"type": "quanta", "target_modules": ["q_proj"]}
BAD: list[tuple[Any, list[str]]] = [
    ("lora", ["adapters='lora'", "list of mappings"]),
    (["lora"], ["adapters[0]='lora'", "lora, bottleneck, quanta"]),
    ([{"rank": 4}], ["adapters[0]={'rank': 4}", "type"]),
    ([{"type": "dora"}], ["adapters[0].type='dora'", "lora, bottleneck, quanta"]),
    ([{"type": ["lora"]}], ["adapters[0].type=['lora']", "lora, bottleneck, quanta"]),
    ([QUERY, {**QUERY, "target_modules": ["k_proj"]}], ["adapters[1].type='lora'", "one entry"]),
    ([{**QUERY, "r": 4}], ["adapters.lora.r=4", "target_modules, rank, lora_alpha, lora_dropout, use_rslora"]),
    ([{"type": "bottleneck", "target_modules": ["up_proj"]}], ["adapters.bottleneck.target_modules", "rank, scale"]),
    ([{"type": "lora"}], ["adapters.lora.target_modules=None", "q_proj, k_proj"]),
    ([{**QUERY, "target_modules": "q_proj"}], ["adapters.lora.target_modules='q_proj'", "list"]),
    ([{**QUERY, "target_modules": []}], ["adapters.lora.target_modules=[]", "q_proj, k_proj"]),
    ([{**QUERY, "target_modules": ["wq"]}], ["adapters.lora.target_modules", "'wq'", "q_proj, k_proj"]),
    ([{**QUERY, "target_modules": ["q_proj"] * 2}], ["adapters.lora.target_modules", "twice"]),
    ([{**QUERY, "rank": 0}], ["adapters.lora.rank=0", "at least 1"]),
    ([{**QUERY, "rank": True}], ["adapters.lora.rank=True", "integer"]),
    ([{**QUERY, "lora_alpha": 0}], ["adapters.lora.lora_alpha=0", "positive"]),
    ([{**QUERY, "lora_alpha": float("inf")}], ["adapters.lora.lora_alpha=inf", "positive"]),
    ([{**QUERY, "lora_dropout": 1.0}], ["adapters.lora.lora_dropout=1.0", "below 1"]),
    ([{**QUERY, "use_rslora": 1}], ["adapters.lora.use_rslora=1", "true or false"]),
    ([{"type": "bottleneck", "rank": 2.0}], ["adapters.bottleneck.rank=2.0", "integer"]),
    ([{"type": "bottleneck", "scale": -1}], ["adapters.bottleneck.scale=-1", "positive"]),
    ([{"type": "bottleneck", "dropout": "no"}], ["adapters.bottleneck.dropout='no'", "number"]),
    ([{**QUANTA, "dims": 24}], ["adapters.quanta.dims=24", "list"]),
    ([{**QUANTA, "dims": [24]}], ["adapters.quanta.dims=[24]", "at least 2 sizes"]),
    ([{**QUANTA, "dims": [24, 1]}], ["adapters.quanta.dims=[24, 1]", "at least 2"]),
    ([{**QUANTA, "dims": [4, 5]}], ["adapters.quanta.dims=[4, 5]", "20", "24 inputs"]),
]


@pytest.mark.parametrize(("adapters", "parts"), BAD, ids=lambda value: str(value) if isinstance(value, list) else "")
def test_bad_entries(adapters: Any, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_model(adapters=adapters)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_quanta_refuses_to_ignore_inputs() -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match="4096 is smaller than the 11008 inputs"):
        llama_7b(adapters=[{"type": "quanta", "target_modules": ["down_proj"]}])


def test_a_type_that_the_model_has_is_not_attached_again() -> None:
    model = tiny_model(adapters=[QUERY])
    with pytest.raises(ConfigError, match="adapters.*'lora'.*one already"):
        model.attach_adapters([{**QUERY, "target_modules": ["k_proj"]}])


def test_defaults_are_filled_in() -> None:
    assert check_adapters(None) == []
    checked = check_adapters([{**QUERY, "target_modules": ["v_proj", "q_proj"]}, {"type": "bottleneck"}, QUANTA])
    assert checked == [
        {
            "type": "lora",
            "target_modules": ["q_proj", "v_proj"],
            "rank": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
            "use_rslora": False,
        },
        {"type": "bottleneck", "rank": 16, "scale": 4.0, "dropout": 0.0},
        {"type": "quanta", "target_modules": ["q_proj"], "dims": [16, 8, 8, 4]},
    ]
    assert check_adapters(checked) == checked
    assert adapter_options("quanta") == {"dims": [16, 8, 8, 4]}
