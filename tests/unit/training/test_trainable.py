"""Which parameters are trained, and with which learning rate and decay."""

import logging
from typing import Any

import pytest
import torch

from lrdint_tune.errors import ConfigError
from lrdint_tune.models import LlamaDecoder, llama3_2
from lrdint_tune.training.trainable import TRAINABLE_GROUPS, group_of, optimizer_groups, parameter_table, set_trainable
from tests.common.tiny_run import SIZES


def build(**options: Any) -> LlamaDecoder:
    with torch.device("meta"):
        return llama3_2(**{**SIZES, "method": "dint", "rank": 2, **options})


def trained(model: LlamaDecoder) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_every_parameter_has_one_group() -> None:
    model = build(tie_word_embeddings=False)
    groups = {group_of(name) for name, _ in model.named_parameters()}
    assert groups == set(TRAINABLE_GROUPS) - {"all"}
    assert {n for n, _ in model.named_parameters() if group_of(n) == "adapter"} == model.adapter_parameters().keys()


@pytest.mark.parametrize(
    ("groups", "some", "others"),
    [
        (
            ["adapter"],
            {"layers.0.attn.method.lam.value", "layers.1.attn.method.q2.up"},
            {"layers.0.attn.q_proj.weight"},
        ),
        (["attention"], {"layers.0.attn.q_proj.weight", "layers.1.attn.output_proj.weight"}, {"norm.scale"}),
        (["norms"], {"norm.scale", "layers.0.sa_norm.scale", "layers.0.mlp_norm.scale"}, {"tok_embeddings.weight"}),
        (["mlp"], {"layers.0.mlp.w1.weight"}, {"layers.0.mlp_norm.scale"}),
        (["embeddings"], {"tok_embeddings.weight"}, {"output.weight"}),
        (["lm_head"], {"output.weight"}, {"tok_embeddings.weight"}),
    ],
)
def test_groups(groups: list[str], some: set[str], others: set[str]) -> None:
    model = build(tie_word_embeddings=False)
    set_trainable(model, groups)
    assert some <= trained(model)
    assert not others & trained(model)
    assert {group_of(name) for name in trained(model)} == set(groups)


def test_all_and_its_opposite() -> None:
    model = build()
    set_trainable(model, ["all"])
    assert len(trained(model)) == len(list(model.parameters()))
    set_trainable(model, ["adapter"])
    assert trained(model) == model.adapter_parameters().keys()


def test_head_of_a_tied_model() -> None:
    with pytest.raises(ConfigError, match="trainable=lm_head.*untie_lm_head=true"):
        set_trainable(build(), ["lm_head"])
    set_trainable(build(), ["lm_head", "embeddings"])
    set_trainable(build(), ["lm_head", "all"])


def test_nothing_to_train(caplog: pytest.LogCaptureFixture) -> None:
    plain = _plain()
    with pytest.raises(ConfigError, match="no parameter of method 'none'.*add attention or all"):
        set_trainable(plain, ["adapter"])
    with caplog.at_level(logging.INFO):
        set_trainable(plain, ["adapter", "attention"])
    assert "no adapter parameters" in caplog.text


def _plain() -> LlamaDecoder:
    with torch.device("meta"):
        return llama3_2(**SIZES)


def test_optimizer_groups() -> None:
    """λ apart, with its own rate and undecayed; norm scales undecayed; every trained parameter exactly once."""
    model = build()
    set_trainable(model, ["adapter", "attention", "norms"])
    matrices, scales, lambdas = optimizer_groups(model, lam_lr=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in lambdas["params"]] == [f"layers.{i}.attn.method.lam.value" for i in range(2)]
    assert lambdas["lr"] == 0.5 and lambdas["weight_decay"] == 0.0
    assert {group_of(names[id(p)]) for p in scales["params"]} == {"norms"}
    assert scales["weight_decay"] == 0.0 and "lr" not in scales
    assert "weight_decay" not in matrices
    together = [names[id(p)] for group in (matrices, scales, lambdas) for p in group["params"]]
    assert sorted(together) == sorted(trained(model))


def test_lambda_lr_without_lambda(caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    set_trainable(model, ["attention"])
    assert len(optimizer_groups(model, lam_lr=0.5)) == 1
    assert "lam_lr=0.5 has no effect" in caplog.text


def test_table() -> None:
    model = build()
    set_trainable(model, ["adapter", "norms"])
    lines = parameter_table(model).splitlines()
    rows = {line.split()[0]: [int(n.replace(",", "")) for n in line.split()[1:]] for line in lines[1:]}
    assert list(rows) == ["adapter", "attention", "norms", "mlp", "embeddings", "total"]
    assert rows["adapter"][1] == 0 and rows["attention"][0] == 0
    assert rows["adapter"][0] == sum(p.numel() for p in model.adapter_parameters().values())
    assert rows["total"] == [sum(row[i] for name, row in rows.items() if name != "total") for i in (0, 1)]
    assert sum(rows["total"]) == sum(p.numel() for p in model.parameters())
