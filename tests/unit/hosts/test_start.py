"""Attached, a method changes nothing; two steps later every one of its tensors has a gradient."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lrdint_tune.hosts import advance_schedule, attach, method_parameters, set_trainable
from tests.common.hosts import CASES, SUPPORTED, inputs, right_padded, tiny, tokens, wake


@pytest.mark.parametrize(("host", "method"), CASES)
def test_identity_at_step_zero(host: str, method: str) -> None:
    model = tiny(host, torch.float32)
    changed = attach(copy.deepcopy(model), method, **SUPPORTED[host][method])
    ids = tokens()
    left = torch.ones_like(ids)
    left[0, :3] = 0
    for given, mask in ((ids, None), right_padded(ids, 7), (ids, left)):
        expected = model(**inputs(host, given, mask)).logits
        torch.testing.assert_close(changed(**inputs(host, given, mask)).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("host", "method"), [case for case in CASES if case[1] != "none"])
def test_live_gradients_within_two_steps(host: str, method: str) -> None:
    model = tiny(host, torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    attach(model, method, **SUPPORTED[host][method])
    set_trainable(model, ["adapter"])
    new = method_parameters(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(new)
    optimizer = torch.optim.SGD(new.values(), lr=0.1)
    # Annealed λ is 0 in the first forward whatever its parameter is, and its step counts from there.
    for step in range(1, 4):
        advance_schedule(model, step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(
            model(**inputs(host, tokens())).logits.flatten(0, -2).float()[:2], torch.tensor([1, 0])
        ).backward()
        optimizer.step()
    for name, parameter in new.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    for name, parameter in model.named_parameters():
        if name not in new:
            assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(("method", "added"), [("daa", 0.59e6), ("dex", 0.59e6), ("diffq", 7.08e6), ("diffv", 7.08e6)])
def test_parameter_counts_of_gpt2_small(method: str, added: float) -> None:
    """Seed 002 D.1: 28.3M in attention, 28.9M with DAA and DEX, 35.4M with DiffQ and DiffV."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    attach(model, method)
    set_trainable(model, ["attention"])
    attention = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert attention == 28_348_416
    new = {name: p.numel() for name, p in method_parameters(model).items()}
    matrices = sum(n for name, n in new.items() if ".lam." not in name)
    assert matrices == pytest.approx(added, rel=0.01)
    assert matrices in (12 * 768**2 // 12, 12 * 768**2)
    assert all(p.is_meta for p in method_parameters(model).values())


def test_lmam_counts_of_roberta() -> None:
    """Seed 004: 2 H_s n r a layer."""
    model = attach(tiny("roberta"), "lmam", heads=2, rank=3, n=10)
    assert sum(p.numel() for p in method_parameters(model).values()) == 2 * 2 * 2 * 10 * 3


@pytest.mark.parametrize("method", ["daa", "diffv"])
def test_a_copied_model_has_its_own_method(method: str) -> None:
    model = attach(tiny("gpt2"), method)
    expected = model(tokens()).logits
    copied = copy.deepcopy(model)
    wake(copied)
    assert torch.equal(model(tokens()).logits, expected)
    assert not torch.allclose(copied(tokens()).logits, expected)


@pytest.mark.parametrize(("host", "method"), CASES)
def test_dtypes(host: str, method: str) -> None:
    """New matrices in the model's dtype, λ in float32, logits in the model's dtype."""
    model = attach(tiny(host, torch.bfloat16), method, **SUPPORTED[host][method])
    wake(model)
    for name, parameter in method_parameters(model).items():
        assert parameter.dtype == (torch.float32 if ".lam." in name else torch.bfloat16), name
    logits = model(**inputs(host, *right_padded(tokens(), 6))).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


@pytest.mark.parametrize("method", ["daa", "dex", "diffq", "diffv", "lmam"])
def test_autocast(method: str) -> None:
    model = tiny("gpt2", torch.float32)
    attach(model, method, **SUPPORTED["gpt2"][method])
    wake(model)
    expected = model(tokens()).logits
    with torch.autocast("cpu", torch.bfloat16):
        got = model(tokens()).logits
    assert (got - expected).norm() < 0.1 * expected.norm()


def test_dropout_is_the_hosts() -> None:
    """On the attention weights, in training only."""
    model = attach(tiny("gpt2", attn_pdrop=0.5), "daa")
    wake(model)
    assert torch.equal(model(tokens()).logits, model(tokens()).logits)
    model.train()
    assert not torch.allclose(model(tokens()).logits, model(tokens()).logits)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = attach(tiny("gpt2"), "diffq")
        wake(model)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(tokens(), use_cache=False).logits.square().sum().backward()
        gradients.append([p.grad for p in method_parameters(model).values()])
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)
