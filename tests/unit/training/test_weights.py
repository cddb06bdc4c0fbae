"""From the meta device to a model in memory, one process; sharding is tested in tests/distributed."""

from typing import Any

import pytest
import torch

from lrdint_tune.errors import ConfigError
from lrdint_tune.training.weights import initial_method_state, load_weights, materialise
from tests.common.tiny_run import SIZES, tiny_dint

TOKENS = torch.arange(20).view(2, 10)


def test_start_values_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = initial_method_state(tiny_dint("meta"), seed=1)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn), "the global random state was used"
    again, other = (initial_method_state(tiny_dint("meta"), seed=s) for s in (1, 2))
    assert first.keys() == tiny_dint().adapter_parameters().keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["layers.0.attn.method.q2.up"], other["layers.0.attn.method.q2.up"])
    assert not torch.equal(first["layers.0.attn.method.q2.up"], first["layers.1.attn.method.q2.up"])
    assert first["layers.0.attn.method.q2.down.weight"].abs().max() <= SIZES["embed_dim"] ** -0.5


@pytest.mark.parametrize(
    "options", [{"lam": "annealed"}, {"lam": "fixed", "lam_init": 0.4}, {"scale_factor": 32}], ids=str
)
def test_materialised_model_is_the_model(options: dict[str, Any]) -> None:
    """RoPE caches and buffers that no state dict holds are there too."""
    torch.manual_seed(3)
    real = tiny_dint(**options)
    model = tiny_dint("meta", **options)
    materialise(model, torch.device("cpu"))
    load_weights(model, real.state_dict().items())
    buffers = dict(real.named_buffers())
    assert dict(model.named_buffers()).keys() == buffers.keys()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    with torch.no_grad():
        assert torch.equal(model(TOKENS), real(TOKENS))


def test_parameters_stay_on_the_cpu_when_fsdp_offloads_them() -> None:
    """The device here has no memory, so that its tensors can be told apart."""
    model = tiny_dint("meta", lam="annealed")
    materialise(model, torch.device("meta"), cpu_offload=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}
    assert len(list(model.buffers())) > 1


def test_bad_weights() -> None:
    model = tiny_dint()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match="tensor layers.9.x is unknown"):
        load_weights(model, [("layers.9.x", torch.zeros(1))])
    with pytest.raises(ConfigError, match=r"norm.scale has shape \[3\], the model needs \[32\]"):
        load_weights(model, [("norm.scale", torch.zeros(3))])
    del state["norm.scale"], state["tok_embeddings.weight"]
    with pytest.raises(ConfigError, match=r"tensor norm.scale \(and 1 more\) not found"):
        load_weights(model, state.items())
    load_weights(model, state.items(), complete=False)


def test_loading_converts_the_dtype() -> None:
    model = tiny_dint()
    load_weights(model, [("norm.scale", torch.full((32,), 0.5, dtype=torch.bfloat16))], complete=False)
    assert model.norm.scale.dtype == torch.float32
    assert (model.norm.scale == 0.5).all()
