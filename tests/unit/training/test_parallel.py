"""From the meta device to a model in memory, one process; sharding is tested in tests/distributed."""

from typing import Any

import pytest
import torch

from lrdint_tune.errors import ConfigError
from lrdint_tune.models import LlamaDecoder, llama3_2
from lrdint_tune.training.parallel import (
    checkpoint_activations,
    initial_method_state,
    load_weights,
    materialise,
    set_precision,
)
from lrdint_tune.training.trainable import set_trainable
from tests.common.tiny_run import SIZES

TOKENS = torch.arange(20).view(2, 10)


def build(device: str = "cpu", **options: Any) -> LlamaDecoder:
    with torch.device(device):
        return llama3_2(**{**SIZES, "method": "dint", "rank": 2, **options})


def test_only_frozen_parameters_become_bf16() -> None:
    model = build("meta")
    set_trainable(model, ["adapter", "norms"])
    set_precision(model, "bf16")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    untouched = build("meta")
    set_trainable(untouched, ["adapter"])
    set_precision(untouched, "fp32")
    assert all(p.dtype == torch.float32 for p in untouched.parameters())


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_recomputes(mode: str) -> None:
    """Every layer's norm runs a second time in the backward pass; matrix products only with ``full``."""
    calls = {"norm": 0, "product": 0}
    model = build()
    names = list(model.state_dict())
    model.layers[0].sa_norm.register_forward_hook(lambda *_: calls.__setitem__("norm", calls["norm"] + 1))
    checkpoint_activations(model, mode)
    assert list(model.state_dict()) == names
    with _CountProducts() as counter:
        loss = model(TOKENS, labels=TOKENS)
        forward = counter.count
        loss.backward()
        backward = counter.count - forward
    assert calls["norm"] == 2
    plain = build()
    with _CountProducts() as counter:
        loss = plain(TOKENS, labels=TOKENS)
        assert counter.count == forward
        loss.backward()
    without = counter.count - forward
    assert backward > without if mode == "full" else backward == without


class _CountProducts(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_start_values_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = initial_method_state(build("meta"), seed=1)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn), "the global random state was used"
    again, other = (initial_method_state(build("meta"), seed=s) for s in (1, 2))
    assert first.keys() == build().adapter_parameters().keys()
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
    real = build(**options)
    model = build("meta", **options)
    materialise(model, torch.device("cpu"))
    load_weights(model, real.state_dict().items())
    buffers = dict(real.named_buffers())
    assert dict(model.named_buffers()).keys() == buffers.keys()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    with torch.no_grad():
        assert torch.equal(model(TOKENS), real(TOKENS))


def test_bad_weights() -> None:
    model = build()
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
    model = build()
    load_weights(model, [("norm.scale", torch.full((32,), 0.5, dtype=torch.bfloat16))], complete=False)
    assert model.norm.scale.dtype == torch.float32
    assert (model.norm.scale == 0.5).all()


@pytest.mark.parametrize(
    "options", [{"method": "none", "rank": None}, {}, {"lam": "annealed"}, {"lam_init": 0.3}], ids=str
)
def test_selective_gradients_are_the_same_bits(options: dict[str, Any]) -> None:
    """What is kept is what would have been computed."""
    gradients = []
    for mode in (None, "selective", "full"):
        torch.manual_seed(3)
        model = build(**options) if options.get("method") != "none" else llama3_2(**SIZES)
        if mode:
            checkpoint_activations(model, mode)
        model(TOKENS, labels=TOKENS).backward()
        model(TOKENS + 1, labels=TOKENS).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for other in gradients[1:]:
        assert [name for name, g in gradients[0].items() if not torch.equal(g, other[name])] == []


def test_a_frozen_lambda_stays_float32() -> None:
    model = build()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    set_precision(model, "bf16")
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert all((dtype == torch.float32) == (".lam." in name) for name, dtype in dtypes.items())
