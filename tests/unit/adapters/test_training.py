"""What the trainer does with a model, with adapters in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lrdint_tune.models import LlamaDecoder
from lrdint_tune.training.activations import checkpoint_activations
from lrdint_tune.training.trainable import optimizer_groups, set_trainable
from lrdint_tune.training.weights import initial_method_state, load_weights, materialise
from tests.common.adapters import ALL, LINEAR, wake_adapters
from tests.common.models import tiny_model, wake

TOKENS = torch.arange(40).view(2, 20)
DROPPING: list[dict[str, Any]] = [
    {**LINEAR[0], "lora_dropout": 0.3},
    LINEAR[1],
    {**ALL[2], "dropout": 0.3},
]


def build(adapters: list[dict[str, Any]] = ALL) -> LlamaDecoder:
    torch.manual_seed(3)
    model = wake(tiny_model(method="dint", rank=3, adapters=adapters))
    wake_adapters(model)
    return model


def step(model: LlamaDecoder, forward: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(7)
    loss = (model if forward is None else forward)(TOKENS, labels=TOKENS.roll(-1, dims=1))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_gives_the_same_bits(mode: str) -> None:
    """With dropout: the recomputation must draw the same mask."""
    loss, gradients = step(build(DROPPING))
    model = build(DROPPING)
    checkpoint_activations(model, mode)
    other_loss, other = step(model)
    assert torch.equal(other_loss, loss)
    assert gradients.keys() == other.keys() == dict(model.named_parameters()).keys()
    assert [name for name, g in gradients.items() if not torch.equal(g, other[name])] == []


def test_compiled_step() -> None:
    loss, gradients = step(build())
    model = build()
    checkpoint_activations(model, "full")
    other_loss, other = step(model, torch.compile(model, backend="eager"))
    torch.testing.assert_close(other_loss, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_only_the_new_tensors_are_trained() -> None:
    model = build()
    set_trainable(model, ["adapter"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == model.adapter_parameters().keys()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(optimizer_groups(model, lam_lr=0.1), lr=0.01)
    step(model)
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == model.adapter_parameters().keys()


def test_adapters_alone_are_something_to_train() -> None:
    model = tiny_model(adapters=LINEAR)
    set_trainable(model, ["adapter"])
    assert all(".adapters." in name for name, p in model.named_parameters() if p.requires_grad)


def test_optimizer_groups() -> None:
    """Biases are not decayed; QuanTA's tensors, whose zero is the pretrained function, are; lambda stays apart."""
    model = build()
    set_trainable(model, ["adapter"])
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, vectors, lambdas = (
        {names[id(p)] for p in group["params"]} for group in optimizer_groups(model, lam_lr=0.1)
    )
    biases = {f"layers.{i}.mlp.adapters.bottleneck.{part}.bias" for i in range(2) for part in ("up", "down")}
    assert vectors == biases
    assert lambdas == {f"layers.{i}.attn.method.lam.value" for i in range(2)}
    assert {"layers.0.mlp.w2.adapters.quanta.tensors.0_1", "layers.1.attn.q_proj.adapters.lora.a.weight"} <= matrices


def test_start_values_and_memory_of_a_meta_device_model() -> None:
    with torch.device("meta"):
        model = tiny_model(method="dint", rank=3, adapters=ALL)
    first, again, other = (initial_method_state(model, seed) for seed in (1, 1, 2))
    assert first.keys() == model.adapter_parameters().keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "layers.{}.mlp.w1.adapters.lora.a.weight"
    assert not torch.equal(first[name.format(0)], other[name.format(0)])
    assert not torch.equal(first[name.format(0)], first[name.format(1)])
    with torch.device("meta"):
        without = tiny_model(method="dint", rank=3)
    assert all(torch.equal(tensor, first[name]) for name, tensor in initial_method_state(without, 1).items())

    plain = tiny_model()
    materialise(model, torch.device("cpu"))
    load_weights(model, [*first.items(), *plain.state_dict().items()])
    assert torch.equal(model(TOKENS), plain(TOKENS))
