"""The lambda parameterisations: their values over a run, what is saved, and what the optimizer sees."""

import pytest
import torch
from torch import Tensor

from lrdint_tune.attention import AttentionShape
from lrdint_tune.attention.lambdas import LambdaForm, build_lambda
from lrdint_tune.errors import ConfigError
from tests.common.models import tiny_model

HEADS, STEPS = 4, 10


def form(name: str, lam_init: float | None = None, sharing: str | None = None, **options: int) -> LambdaForm:
    options.setdefault("anneal_steps", None)
    shape = AttentionShape(embed_dim=24, num_heads=HEADS, num_kv_heads=2, head_dim=8, layer_index=2)
    return build_lambda(name, shape, num_heads=HEADS, lam_init=lam_init, lam_sharing=sharing, **options)


def effective(module: torch.nn.Module) -> Tensor:
    """Lambda as it multiplies [B, H, N, hd], checked for its shape, as [H or 1]."""
    lam = module(torch.randn(2, 5, 24))
    out = lam * torch.ones(2, HEADS, 5, 8)
    assert out.shape == (2, HEADS, 5, 8)
    return out[0, :, 0, 0].detach()


def annealed(p: float, lam_init: float | None = None) -> torch.nn.Module:
    module = form("annealed", lam_init, anneal_steps=STEPS)
    with torch.no_grad():
        module.value.fill_(p)
    return module


@pytest.mark.parametrize(
    ("step", "want"),
    [
        (0, 0.0),
        (1, 0.9 * 0.1 * 0.8 + 0.1 * 0.25),
        (STEPS // 2, 0.5 * 0.5 * 0.8 + 0.5 * 0.25),
        (STEPS - 1, 0.1 * 0.9 * 0.8 + 0.9 * 0.25),
        (STEPS, 0.25),
        (STEPS + 1, 0.25),
        (7 * STEPS, 0.25),
    ],
)
def test_annealed_values(step: int, want: float) -> None:
    """(1 - a) (t/T) lam_init + a p with a = min(1, t/T): p alone from T on."""
    model = tiny_model(method="dint", lam="annealed", anneal_steps=STEPS)
    with torch.no_grad():
        for name, parameter in model.adapter_parameters().items():
            if name.endswith("lam.value"):
                parameter.fill_(0.25)
    model.advance_schedule(step)
    for layer in model.layers:
        torch.testing.assert_close(effective(layer.attn.method.lam), torch.full((HEADS,), want), rtol=0, atol=1e-7)


def test_annealed_starts_at_zero_and_takes_lam_init() -> None:
    module = form("annealed", 0.4, anneal_steps=STEPS)
    assert (module.value == 0).all() and (effective(module) == 0).all()
    module.step.fill_(STEPS / 2)
    torch.testing.assert_close(effective(module), torch.full((HEADS,), 0.25 * 0.4))


def test_step_survives_a_round_trip_of_the_state_dict() -> None:
    source = tiny_model(method="diff", lam="annealed", anneal_steps=STEPS)
    source.advance_schedule(3)
    state = source.state_dict()
    assert state["layers.1.attn.method.lam.step"].shape == (1,)
    assert state["layers.1.attn.method.lam.step"].dtype == torch.float32
    target = tiny_model(method="diff", lam="annealed", anneal_steps=STEPS)
    tokens = torch.randint(61, (1, 9))
    target.load_state_dict(state)
    assert torch.equal(target(tokens), source(tokens))
    target.advance_schedule(4)
    assert not torch.equal(target(tokens), source(tokens))


def test_a_schedule_is_advanced_without_a_copy_elsewhere() -> None:
    """`advance_schedule` sets the step, it does not add to it; a model without a schedule is left alone."""
    model = tiny_model(method="dint", lam="annealed", anneal_steps=STEPS)
    for step in (5, 2):
        model.advance_schedule(step)
    assert all(layer.attn.method.lam.step.item() == 2 for layer in model.layers)
    for method in ("none", "diff", "dint"):
        plain = tiny_model(method=method)
        before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
        plain.advance_schedule(5)
        assert all(torch.equal(before[name], tensor) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("sharing", ["head", "layer"])
def test_learned(sharing: str) -> None:
    module = form("learned", sharing=sharing)
    assert module.value.shape == ((HEADS,) if sharing == "head" else (1,))
    assert module.value.dtype == torch.float32
    assert (module.value == 0).all()
    values = torch.linspace(-1, 1, module.value.numel())
    with torch.no_grad():
        module.value.copy_(values)
    assert torch.equal(effective(module), values.expand(HEADS))
    started = form("learned", 0.3, sharing)
    torch.testing.assert_close(effective(started), torch.full((HEADS,), 0.3))


def test_fixed_has_no_parameter() -> None:
    module = form("fixed")
    assert not list(module.parameters())
    assert not module.state_dict()
    torch.testing.assert_close(effective(module), torch.full((HEADS,), 0.1))


def test_parameters_are_float32_in_one_dimension_whatever_the_model() -> None:
    """FSDP2 refuses 0-dim parameters."""
    for options in ({}, {"lam_sharing": "layer"}, {"lam": "annealed"}):
        for name, parameter in tiny_model(method="dint", **options).adapter_parameters().items():
            assert parameter.dim() >= 1, name
            assert parameter.dtype == torch.float32, name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lam": "constant"}, ["constant", "learned", "annealed", "fixed"]),
        ({"lam_sharing": "token"}, ["token", "head", "layer"]),
        ({"lam": "learned", "anneal_steps": 5}, ["anneal_steps", "5", "annealed"]),
        ({"lam": "fixed", "anneal_steps": 5}, ["anneal_steps", "5", "annealed"]),
        ({"lam": "annealed", "anneal_steps": 0}, ["anneal_steps", "0"]),
    ],
)
def test_errors(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_model(method="dint", **options)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
