"""What cannot apply is refused by name, and leaves the model as it was."""

import re
from typing import Any

import pytest
import torch
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
)

from lrdint_tune.errors import ConfigError
from lrdint_tune.hosts import attach, load, save, set_trainable
from tests.common.hosts import tiny, tokens

CLASSES = "GPT2LMHeadModel, RobertaForSequenceClassification, BartForConditionalGeneration, LlamaForCausalLM"


@pytest.mark.parametrize(
    ("host", "method", "options", "message"),
    [
        ("gpt2", "diff", {}, "method='diff': not for transformers models.*keys or sums of its own.*lrdint_tune.models"),
        ("gpt2", "dint", {}, "method='dint'"),
        ("gpt2", "difflora", {}, "method='difflora'"),
        ("gpt2", "diffk", {}, "method='diffk'"),
        ("gpt2", "nothing", {}, "method='nothing': unknown; choose one of none, diff"),
        ("gpt2", "daa", {"rank": 3}, "rank=3: method 'daa' has no such option"),
        ("llama", "daa", {}, "position='before'.*set position=after"),
        ("llama", "diffq", {}, "method='diffq'.*RoPE"),
        ("gpt2", "daa", {"where": "encoder"}, "where='encoder': GPT2LMHeadModel has no such part; choose from decoder"),
        ("bart", "daa", {"where": "all"}, "where='all'.*encoder, decoder, both"),
        ("gpt2", "none", {"adapters": [{"type": "quanta"}]}, "adapters"),
        (
            "gpt2",
            "none",
            {"adapters": [{"type": "bottleneck"}, {"type": "lora", "target_modules": ["q_proj"]}]},
            r"adapters\[1\].type='lora': not for transformers models; use bottleneck",
        ),
    ],
)
def test_methods_and_options(host: str, method: str, options: dict[str, Any], message: str) -> None:
    model = tiny(host)
    before, implementation = list(model.state_dict()), model.config._attn_implementation
    with pytest.raises(ConfigError, match=message):
        attach(model, method, **options)
    assert list(model.state_dict()) == before and model.config._attn_implementation == implementation
    attach(model, "none")


def test_other_models() -> None:
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    with torch.device("meta"):
        deberta = DebertaV2ForSequenceClassification(DebertaV2Config(**sizes))
        mistral = MistralForCausalLM(MistralConfig(num_key_value_heads=1, **sizes))
    with pytest.raises(
        ConfigError, match=f"DebertaV2.*has no attention interface in transformers; use one of {CLASSES}"
    ):
        attach(deberta, "daa")
    with pytest.raises(ConfigError, match=f"MistralForCausalLM: is not supported; use one of {CLASSES}"):
        attach(mistral, "daa")
    with pytest.raises(ConfigError, match="model=Linear"):
        attach(torch.nn.Linear(2, 2), "daa")  # type: ignore[arg-type]


def test_sliding_window() -> None:
    with pytest.raises(ConfigError, match="model.sliding_window=4: windows are not supported"):
        attach(tiny("llama", sliding_window=4), "dex")


def test_second_method() -> None:
    model = attach(tiny("gpt2"), "dex")
    with pytest.raises(ConfigError, match="has a method already"):
        attach(model, "daa")


def test_masks_and_caches_that_are_not_understood() -> None:
    model = attach(tiny("gpt2"), "daa")
    with pytest.raises(ConfigError, match="attention_mask=torch.float64.*must be bool"):
        model(tokens(), attention_mask=torch.zeros(2, 1, 11, 11, dtype=torch.float64))
    with pytest.raises(ConfigError, match="cache_implementation='static'"):
        model.generate(tokens(), max_new_tokens=3, cache_implementation="static")


def test_trainable_groups() -> None:
    model = attach(tiny("gpt2"), "daa")
    with pytest.raises(ConfigError, match="trainable='mlp': unknown; choose from adapter, attention, head, all"):
        set_trainable(model, ["mlp"])
    with pytest.raises(ConfigError, match="trainable=head: the head is the embedding matrix"):
        set_trainable(model, ["adapter", "head"])
    with pytest.raises(ConfigError, match="method 'none' has no such parameter"):
        set_trainable(attach(tiny("gpt2"), "none"), ["adapter"])
    set_trainable(model, ["attention"])
    assert {re.sub(r"\d", "i", n) for n, p in model.named_parameters() if p.requires_grad} == {
        f"transformer.h.i.attn.{module}.{kind}" for module in ("c_attn", "c_proj") for kind in ("weight", "bias")
    }
    classifier = attach(tiny("roberta"), "lmam")
    set_trainable(classifier, ["attention", "head"])
    trained = {n for n, p in classifier.named_parameters() if p.requires_grad}
    assert {n for n in trained if not n.startswith("classifier.")} == {
        f"roberta.encoder.layer.{i}.attention.{module}.{kind}"
        for i in range(2)
        for module in ("self.query", "self.key", "self.value", "output.dense")
        for kind in ("weight", "bias")
    }
    assert len([n for n in trained if n.startswith("classifier.")]) == 4


def test_without_a_method(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="has no method; call lrdint_tune.hosts.attach"):
        save(tiny("gpt2"), tmp_path / "out")
    with pytest.raises(ConfigError, match="no method.json"):
        load(tiny("gpt2"), tmp_path)
