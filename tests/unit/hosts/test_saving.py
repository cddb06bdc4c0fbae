"""Base + folder is the trained model; a folder that belongs elsewhere is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lrdint_tune.errors import ConfigError
from lrdint_tune.hosts import advance_schedule, attach, calibrate, load, methods, save, set_trainable
from tests.common.hosts import CASES, SUPPORTED, inputs, tiny, tokens, wake

BOTTLENECK = [{"type": "bottleneck", "rank": 3, "dropout": 0.5}]


@pytest.mark.parametrize(("host", "method"), CASES)
def test_equal_logits(host: str, method: str, tmp_path: Path) -> None:
    model = attach(tiny(host), method, **SUPPORTED[host][method], adapters=BOTTLENECK)
    wake(model)
    set_trainable(model, ["adapter"])
    save(model, tmp_path / "out")
    assert not (tmp_path / "out" / "trained_base.safetensors").exists()
    loaded = load(tiny(host), tmp_path / "out")
    given = inputs(host, tokens())
    expected = model(**given).logits
    assert torch.equal(loaded(**given).logits, expected)
    assert not torch.allclose(expected, tiny(host)(**given).logits, atol=1e-3)


def test_trained_base_and_schedule(tmp_path: Path) -> None:
    model = attach(tiny("gpt2"), "daa", anneal_steps=10)
    set_trainable(model, ["adapter", "attention"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 if parameter.requires_grad else 0)
    advance_schedule(model, 4)
    save(model, tmp_path / "out")
    loaded = load(tiny("gpt2"), tmp_path / "out")
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert methods(loaded)[0].lam.step.item() == 4
    with torch.no_grad():
        model.transformer.h[0].attn.method.w_daa.zero_()
    save(model, tmp_path / "out")  # replaces
    assert torch.equal(load(loaded, tmp_path / "out")(tokens()).logits, model(tokens()).logits)


def test_calibrated_heads_are_saved(tmp_path: Path) -> None:
    model = attach(tiny("roberta"), "dex", heads="top_entropy", top_k=1)
    calibrate(model, [{"input_ids": tokens()}])
    selected = [method.selected for method in methods(model)]
    assert [s.sum().item() for s in selected] == [1, 1]
    save(model, tmp_path / "out")
    for method, expected in zip(methods(load(tiny("roberta"), tmp_path / "out")), selected, strict=True):
        assert torch.equal(method.selected, expected)


@pytest.mark.parametrize(
    ("host", "changes", "options", "message"),
    [
        ("llama", {}, None, "saved with architecture='GPT2LMHeadModel', the model has architecture='LlamaForCausalLM'"),
        ("gpt2", {"n_layer": 1}, None, "saved with num_layers=2, the model has num_layers=1"),
        ("gpt2", {"n_head": 2}, None, "saved with num_heads=4, the model has num_heads=2"),
        ("gpt2", {}, {"method": "dex"}, "saved with method='daa', the model has method='dex'"),
        ("gpt2", {}, {"method": "daa", "anneal_steps": 7}, "saved with anneal_steps=10, the model has anneal_steps=7"),
        ("gpt2", {}, {"method": "daa", "anneal_steps": 10, "adapters": BOTTLENECK}, "saved with adapters="),
    ],
)
def test_mismatch(
    host: str, changes: dict[str, Any], options: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    save(attach(tiny("gpt2"), "daa", anneal_steps=10), tmp_path / "out")
    other = tiny(host, **changes)
    if options:
        attach(other, **options)
    with pytest.raises(ConfigError, match=message):
        load(other, tmp_path / "out")


def test_damaged_and_foreign_folders(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    model = attach(tiny("gpt2"), "daa")
    with pytest.raises(ConfigError, match="was not saved by lrdint_tune.hosts; choose another one"):
        save(model, tmp_path / "notes")
    save(model, tmp_path / "out")
    file = tmp_path / "out" / "method.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match="method.safetensors: missing or damaged"):
        load(tiny("gpt2"), tmp_path / "out")
    file.unlink()
    with pytest.raises(ConfigError, match="method.safetensors: missing or damaged"):
        load(tiny("gpt2"), tmp_path / "out")
    config = tmp_path / "out" / "method.json"
    config.write_text(json.dumps({"format": 99}))
    with pytest.raises(ConfigError, match="format=99: expected 1"):
        load(tiny("gpt2"), tmp_path / "out")
