"""Sums of the rows of the combined map, read off the fast code by attending to values that are all one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.common.layouts import BATCH, LAYOUTS, LENGTH, layout_case
from tests.common.models import TINY, attention_of, tiny_model, wake


def row_sums(layout: str, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    """(sums [B, N, H], lambda [H]) of one attention module whose values are all one."""
    model = wake(tiny_model(num_layers=1, attention_backend=backend, **options))
    attention = attention_of(model)
    x = torch.randn(BATCH, LENGTH, TINY["embed_dim"], dtype=torch.float64)
    x[..., 0] = 1
    with torch.no_grad():
        attention.v_proj.weight.zero_()
        attention.v_proj.weight[:, 0] = 1
    attention.output_proj = nn.Identity()
    case = layout_case(layout)
    out = attention(x, x, mask=case.mask, input_pos=case.input_pos).unflatten(-1, (attention.num_heads, -1))
    torch.testing.assert_close(out, out[..., :1].expand_as(out))
    return out[..., 0][case.rows.valid], attention.method.lam.value.detach()


@pytest.mark.parametrize("integral", ["causal", "sequence"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_dint_sum_to_one(layout: str, backend: str, integral: str) -> None:
    options = {"integral": integral, "allow_future_leak": True} if integral == "sequence" else {}
    sums, lam = row_sums(layout, backend, method="dint", rank=3, **options)
    assert lam.abs().min() > 0.1
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_diff_sum_to_one_minus_lambda(layout: str) -> None:
    sums, lam = row_sums(layout, "sdpa", method="diff", rank=3)
    torch.testing.assert_close(sums, (1 - lam).expand_as(sums), rtol=0, atol=1e-12)
