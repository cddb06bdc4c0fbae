"""What is shown of a forward pass."""

import pytest
import torch

from tests.common.models import TINY, tiny_model, wake

TOKENS = torch.randint(TINY["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(1))


def test_values() -> None:
    """λ as it is before it is rounded to the activations' dtype, and a ratio of norms; both of the last forward."""
    model = tiny_model("dint", rank=3, num_layers=1).to(torch.bfloat16)
    method = model.attention(0).method
    method.lam.float()
    wake(model)
    value = method.lam.value.detach()
    assert not torch.equal(value.bfloat16().float(), value)
    model.enable_diagnostics()
    model(TOKENS + 1)
    earlier = model.diagnostics()
    model(TOKENS)
    values = model.diagnostics()
    assert values["lambda_min/layers.0"] == value.min() and values["lambda_max/layers.0"] == value.max()
    torch.testing.assert_close(values["lambda_mean/layers.0"], value.mean())
    assert 0.1 < values["o2_o1_ratio/layers.0"] < 10
    assert earlier["o2_o1_ratio/layers.0"] != values["o2_o1_ratio/layers.0"]
    model.enable_diagnostics(False)
    assert model.diagnostics() == {}


@pytest.mark.parametrize("options", [{"method": "none"}, {"method": "lmam", "inside_softmax": True}], ids=str)
def test_none_without_a_second_term(options: dict[str, object]) -> None:
    model = tiny_model(**options)
    model.enable_diagnostics()
    model(TOKENS)
    assert model.diagnostics() == {}


def test_none_before_the_first_forward() -> None:
    model = tiny_model("dint")
    assert model.diagnostics() == {}
    model.enable_diagnostics()
    assert model.diagnostics() == {}
