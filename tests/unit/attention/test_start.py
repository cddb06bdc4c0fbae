"""At step 0 every default is the model it was put into, and its new tensors are alive within two optimizer steps."""

from typing import Any

import pytest
import torch

from lrdint_tune.models.decoder import LlamaDecoder
from tests.common.models import TINY, base_state, tiny_model

METHODS: dict[str, dict[str, Any]] = {
    f"{method}-{lam}-{factors}": {
        "method": method,
        "lam": lam,
        **({"rank": None} if factors == "full" else {"rank": 3, "factors": factors}),
        **({"anneal_steps": 100} if lam == "annealed" else {}),
    }
    for method in ("diff", "dint")
    for lam in ("learned", "annealed")
    for factors in ("per_head", "shared", "full")
}


def pair(**options: Any) -> tuple[LlamaDecoder, LlamaDecoder]:
    """The unmodified model, and the model with a method on the same base weights."""
    plain, model = tiny_model(), tiny_model(**options)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(".method." in name for name in missing)
    return plain, model


@pytest.mark.parametrize("method", METHODS)
def test_step_zero_is_the_identity(method: str) -> None:
    plain, model = pair(**METHODS[method])
    tokens = torch.randint(TINY["vocab_size"], (2, 20))
    torch.testing.assert_close(model(tokens), plain(tokens), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["diff", "dint"])
def test_fixed_lambda_is_not_the_identity(method: str) -> None:
    """`fixed` documents itself as no identity (lambda 0.1 from the start); this also shows that the test can fail."""
    plain, model = pair(method=method, lam="fixed")
    tokens = torch.randint(TINY["vocab_size"], (2, 20))
    assert (model(tokens) - plain(tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("method", [*METHODS, "diff-fixed", "dint-fixed"])
def test_every_new_tensor_is_alive_within_two_steps(method: str) -> None:
    if method in METHODS:
        model = tiny_model(**METHODS[method])
    else:
        model = tiny_model(method=method.split("-")[0], lam="fixed", rank=3)
    tokens = torch.randint(TINY["vocab_size"], (2, 20))
    labels = tokens.roll(-1, dims=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    largest = dict.fromkeys(model.adapter_parameters(), 0.0)
    assert largest
    for step in (1, 2):
        model.advance_schedule(step)
        optimizer.zero_grad()
        model(tokens, labels=labels).backward()
        for name, parameter in model.adapter_parameters().items():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            largest[name] = max(largest[name], parameter.grad.abs().max().item())
        optimizer.step()
    assert all(value > 1e-7 for value in largest.values()), largest


def test_new_tensors_start_as_linear_layers_do() -> None:
    """Wdown ~ U(+-1/sqrt(D)), Wup ~ U(+-1/sqrt(r)); lambda exactly 0."""
    rank = 4
    model = tiny_model(method="dint", rank=rank, embed_dim=512, head_dim=64, num_layers=1)
    method = model.layers[0].attn.method
    for factors in (method.q2, method.k2):
        for tensor, bound in ((factors.down.weight, 512**-0.5), (factors.up, rank**-0.5)):
            assert 0.97 * bound < tensor.abs().max() <= bound
            torch.testing.assert_close(tensor.var().item(), bound**2 / 3, rtol=0.12, atol=0)
    assert (method.lam.value == 0).all()


def test_base_names_are_unchanged() -> None:
    assert set(base_state(tiny_model(method="dint"))) == set(tiny_model().state_dict())
    assert not tiny_model().adapter_parameters()
