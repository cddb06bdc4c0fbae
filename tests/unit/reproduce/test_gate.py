"""The control with λ of each token and no second map."""

import pytest
import torch

from lrdint_tune.attention import METHODS
from lrdint_tune.errors import ConfigError
from lrdint_tune.reproduce.gate import registered
from tests.common.models import TINY, tiny_model, wake

TOKENS = torch.randint(TINY["vocab_size"], (2, 16), generator=torch.Generator().manual_seed(1))


def test_it_scales_each_heads_output() -> None:
    """The pretrained model at first, with a gradient; then (1 - tanh(x W)) times every head's output."""
    with registered():
        model = tiny_model("gate", num_layers=1)
    plain = tiny_model(num_layers=1)
    model.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), rtol=0, atol=0)
    model(TOKENS, labels=TOKENS.roll(-1, 1)).backward()
    (weight,) = model.adapter_parameters().values()
    assert weight.grad is not None and (weight.grad != 0).all()

    wake(model)
    attention, x = model.attention(0), torch.randn(2, 16, TINY["embed_dim"], dtype=weight.dtype)
    outputs = []
    for layer in (attention, plain.attention(0)):
        layer.output_proj = torch.nn.Identity()
        outputs.append(layer(x, x).unflatten(-1, (attention.num_heads, -1)))
    gate = 1 - (x @ weight.T).tanh()
    torch.testing.assert_close(outputs[0], outputs[1] * gate[..., None])


def test_it_is_known_in_the_experiment_only() -> None:
    with pytest.raises(RuntimeError, match="stopped"), registered():
        assert "gate" in METHODS
        raise RuntimeError("stopped")
    assert "gate" not in METHODS
    with pytest.raises(ConfigError, match="method='gate': unknown; choose one of none, diff"):
        tiny_model("gate")
