"""The complex rotation gives torchtune's RoPE to the bit, and its gradient."""

import pytest
import torch
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.modules import RotaryPositionalEmbeddings

from lrdint_tune.models.component import build_rope


def build(scale_factor):
    ours = build_rope(16, 50, 10_000, scale_factor)
    if scale_factor == 1:
        return ours, RotaryPositionalEmbeddings(16, max_seq_len=50, base=10_000)
    return ours, Llama3ScaledRoPE(16, max_seq_len=50, base=10_000, scale_factor=scale_factor)


@pytest.mark.parametrize("scale_factor", [1, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [None, torch.arange(3, 12), torch.randint(0, 50, (2, 9))])
def test_equals_torchtune(scale_factor, dtype, positions):
    ours, theirs = build(scale_factor)
    x = torch.randn(2, 9, 3, 16, dtype=dtype, requires_grad=True)
    gradient = torch.randn(2, 9, 3, 16, dtype=dtype)
    results = [rope(x, input_pos=positions) for rope in (ours, theirs)]
    assert torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(y, x, gradient)[0] for y in results))


def test_float64_stays_float64():
    ours, theirs = build(1)
    x = torch.randn(1, 9, 3, 16, dtype=torch.float64, requires_grad=True)
    y = ours(x)
    assert y.dtype == torch.float64 and 0 < (y - theirs(x)).abs().max() < 1e-6
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-7, atol=0)
    assert torch.autograd.gradcheck(ours, (x,))


def test_after_a_cast_of_the_module_and_from_the_meta_device():
    ours, theirs = build(32)
    x = torch.randn(1, 9, 3, 16, dtype=torch.bfloat16)
    assert torch.equal(ours.to(torch.bfloat16)(x), theirs.to(torch.bfloat16)(x))
    with torch.device("meta"):
        late = build_rope(16, 50, 10_000, 32)
    late.to_empty(device="cpu").rope_init()
    assert torch.equal(late(x.float()), build(32)[1](x.float()))
