"""At step 0 adapters change nothing; within two steps each of their tensors is alive; the base keeps its names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lrdint_tune.adapters import attached
from lrdint_tune.models import LlamaDecoder
from lrdint_tune.models.decoder import is_new_tensor
from tests.common.adapters import ALL, EACH, LINEAR, wake_adapters
from tests.common.models import TINY, tiny_model, wake

METHODS: list[dict[str, Any]] = [{"method": "none"}, {"method": "dint", "rank": 3}]


def tokens() -> torch.Tensor:
    return torch.randint(TINY["vocab_size"], (2, 20))


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("name", EACH)
def test_step_zero_is_the_identity(name: str, options: dict[str, Any]) -> None:
    plain, model = tiny_model(**options), tiny_model(**options, adapters=EACH[name])
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert missing and all(".adapters." in tensor for tensor in missing)
    x = tokens()
    assert torch.equal(model(x), plain(x))
    wake_adapters(model)
    assert (model(x) - plain(x)).abs().max() > 1e-2


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("name", EACH)
def test_every_new_tensor_is_alive_within_two_steps(name: str, options: dict[str, Any]) -> None:
    model = tiny_model(**options, adapters=EACH[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    largest = dict.fromkeys(model.adapter_parameters(), 0.0)
    assert largest and all(map(is_new_tensor, largest))
    x = tokens()
    for _ in range(2):
        optimizer.zero_grad()
        model(x, labels=x.roll(-1, dims=1)).backward()
        for tensor, parameter in model.adapter_parameters().items():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), tensor
            largest[tensor] = max(largest[tensor], parameter.grad.abs().max().item())
        optimizer.step()
    assert all(value > 1e-7 for value in largest.values()), largest


def test_new_tensors_start_as_they_should() -> None:
    quanta = {"type": "quanta", "target_modules": ["v_proj"], "dims": [8, 8, 8]}
    model = tiny_model(adapters=[LINEAR[0], quanta, ALL[2]], embed_dim=512, num_layers=1)
    lora, mlp = attached(model.layers[0].attn.q_proj)["lora"], attached(model.layers[0].mlp)["bottleneck"]
    for tensor in (lora.a.weight, mlp.down.weight):
        assert 0.95 * 512**-0.5 < tensor.abs().max() <= 512**-0.5
        torch.testing.assert_close(tensor.var().item(), 1 / (3 * 512), rtol=0.12, atol=0)
    zero = [lora.b.weight, mlp.down.bias, mlp.up.weight, mlp.up.bias]
    zero += attached(model.layers[0].attn.v_proj)["quanta"].parameters()
    assert all((tensor == 0).all() for tensor in zero)


def test_updates_of_one_module_add_up() -> None:
    model = tiny_model(adapters=LINEAR)
    wake_adapters(model)
    projection, x = model.layers[0].attn.output_proj, torch.randn(3, 32)
    lora, quanta = (attached(projection)[kind] for kind in ("lora", "quanta"))
    torch.testing.assert_close(projection(x), x @ projection.weight.T + lora(x) + quanta(x))
    # and one attached alone is the sum without the other
    assert (lora(x).abs().max() > 1e-2) and (quanta(x).abs().max() > 1e-2)


def test_a_method_sees_the_adapted_projections() -> None:
    """dint with adapters = dint on the merged weights, lambda awake."""
    model = wake(tiny_model(method="dint", rank=3, adapters=LINEAR))
    wake_adapters(model)
    merged = wake(tiny_model(method="dint", rank=3))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".adapters." not in name}
    for path in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "mlp.w1", "mlp.w2", "mlp.w3"):
        for i, layer in enumerate(model.layers):
            for adapter in attached(layer.get_submodule(path)).values():
                state[f"layers.{i}.{path}.weight"] += adapter.delta_weight().detach()
    merged.load_state_dict(state)
    x = tokens()
    torch.testing.assert_close(model(x), merged(x), rtol=1e-4, atol=1e-5)


def test_only_the_target_modules_are_adapted() -> None:
    model = tiny_model(adapters=[{"type": "lora", "target_modules": ["o_proj", "up_proj"]}])
    owners = {name.split(".adapters.")[0] for name in model.adapter_parameters()}
    assert owners == {f"layers.{i}.{path}" for i in range(2) for path in ("attn.output_proj", "mlp.w3")}


def test_a_copy_is_independent() -> None:
    model = tiny_model(adapters=ALL)
    wake_adapters(model)
    x = tokens()
    before = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), before)
    wake_adapters(twin, std=0.2)
    assert torch.equal(model(x), before)
    assert (twin(x) - before).abs().max() > 1e-2
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), before)


def test_attaching_is_possible_after_the_base_was_converted_to_fp8() -> None:
    """A conversion replaces the linear layers; the adapters are attached to what it leaves, and are not converted."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear

    def base() -> LlamaDecoder:
        sizes = dict(embed_dim=32, head_dim=8, intermediate_dim=64, num_layers=1)
        torch.manual_seed(3)
        model = tiny_model(**sizes)
        config = Float8LinearConfig(emulate=True)
        return convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name != "output")

    plain, model = base(), base()
    model.attach_adapters([{**LINEAR[0], "target_modules": ["q_proj", "down_proj"]}, {**ALL[2]}])
    query = model.layers[0].attn.q_proj
    assert isinstance(query, Float8Linear)
    assert type(attached(query)["lora"].a) is torch.nn.Linear
    assert [entry["type"] for entry in model.spec.adapters] == ["lora", "bottleneck"]
    x = torch.randint(TINY["vocab_size"], (2, 16))
    assert torch.equal(model(x), plain(x))
    wake_adapters(model)
    assert (model(x) - plain(x)).abs().max() > 1e-2
