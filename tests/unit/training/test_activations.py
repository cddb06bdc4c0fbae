"""Activation checkpointing: what is recomputed, and that it changes nothing."""

from typing import Any

import pytest
import torch

from lrdint_tune.errors import ConfigError
from lrdint_tune.models import llama3_2
from lrdint_tune.training.activations import checkpoint_activations
from tests.common.tiny_run import SIZES, tiny_dint

TOKENS = torch.arange(20).view(2, 10)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_recomputes(mode: str) -> None:
    """Every layer's norm runs a second time in the backward pass; matrix products only with ``full``."""
    calls = {"norm": 0, "product": 0}
    model = tiny_dint()
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
    plain = tiny_dint()
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


@pytest.mark.parametrize(
    "options", [{"method": "none", "rank": None}, {}, {"lam": "annealed"}, {"lam_init": 0.3}], ids=str
)
def test_selective_gradients_are_the_same_bits(options: dict[str, Any]) -> None:
    """What is kept is what would have been computed."""
    gradients = []
    for mode in (None, "selective", "full"):
        torch.manual_seed(3)
        model = tiny_dint(**options) if options.get("method") != "none" else llama3_2(**SIZES)
        if mode:
            checkpoint_activations(model, mode)
        model(TOKENS, labels=TOKENS).backward()
        model(TOKENS + 1, labels=TOKENS).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for other in gradients[1:]:
        assert [name for name, g in gradients[0].items() if not torch.equal(g, other[name])] == []


@pytest.mark.parametrize(("every", "recomputed"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3]), (3, [2]), (5, [4])])
def test_every_kth_block_is_checkpointed(every: int, recomputed: list[int]) -> None:
    model = tiny_dint(num_layers=5)
    runs = [0] * 5
    for i, layer in enumerate(model.layers):
        layer.sa_norm.register_forward_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    checkpoint_activations(model, "every_k", every)
    model(TOKENS, labels=TOKENS).backward()
    assert [i for i, count in enumerate(runs) if count == 2] == recomputed
    assert set(runs) <= {1, 2}


def test_more_than_the_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="ac_option=3: the model has 2 blocks"):
        checkpoint_activations(tiny_dint(), "every_k", 3)
