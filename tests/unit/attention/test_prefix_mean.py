"""The blocked prefix mean against a sum per document, and that nothing leaks through its zeros."""

import pytest
import torch

from lrdint_tune.attention import DocumentMask, Layout, integral, running_mean
from lrdint_tune.attention.prefix_mean import BLOCK, PrefixMean

# Around the block size, and shorter than one block.
LENGTHS = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 5 * BLOCK + 7]


def plain_mean(x, starts, counted):
    """Row by row: x [B, H, N, hd], starts and counted bool [B, N]."""
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for i in range(x.shape[2]):
            begin = max([m for m in range(i + 1) if starts[b, m]], default=0)
            rows = [m for m in range(begin, i + 1) if counted[b, m]]
            if counted[b, i]:
                out[b, :, i] = x[b, :, rows].mean(1)
    return out


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_document_equals_cumsum(length, dtype):
    x = torch.randn(2, 3, length, 4, dtype=dtype)
    expected = x.double().cumsum(2) / torch.arange(1, length + 1)[:, None]
    actual = running_mean(x, Layout(None, None, num_queries=length))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-15)


@pytest.mark.parametrize("length", LENGTHS[3:])
def test_documents_and_padding(length):
    x = torch.randn(4, 2, length, 3, dtype=torch.float64)
    starts = torch.rand(4, length) < 0.04
    starts[1] = torch.rand(length) < 0.5  # many documents within a block
    starts[2] = False  # one document over all blocks
    counted = torch.rand(4, length) < 0.8
    mean = PrefixMean(starts, counted, torch.float64)
    expected = plain_mean(x, starts, counted) * counted[:, None, :, None]  # padded rows receive nothing
    torch.testing.assert_close(mean(x), expected, rtol=0, atol=1e-14)


def test_packed_layouts_agree():
    """The same documents given as lengths and as a dense mask."""
    documents = DocumentMask([[50, 1, 90], [141], [3, 64, 74]])
    x = torch.randn(3, 2, 141, 4, dtype=torch.float64)
    by_lengths = running_mean(x, Layout(documents, None, num_queries=141))
    by_mask = running_mean(x, Layout(documents.to_dense(), None, num_queries=141))
    assert torch.equal(by_lengths, by_mask)
    starts = documents.input_pos() == 0
    torch.testing.assert_close(by_lengths, plain_mean(x, starts, torch.ones_like(starts)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("length", [5, BLOCK + 9])
def test_gradient(length):
    mask = DocumentMask([[length - 3, 3]])
    x = torch.randn(1, 2, length, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: running_mean(x, Layout(mask, None, num_queries=length)), (x,))


@pytest.mark.parametrize("lam_shape", [(2, 1, 1), (1, 1, 1), (1, 2, BLOCK + 9, 1)], ids=["head", "layer", "token"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_integral_is_its_formula(lam_shape, dtype):
    """Values and gradients of the hand-written form against ``O1 + λ (mean(O1) - O2)`` by autograd."""
    layout = Layout(DocumentMask([[BLOCK + 6, 3]]), None, num_queries=BLOCK + 9)
    o1, o2, grad = torch.randn(3, 1, 2, BLOCK + 9, 4, dtype=dtype)
    inputs = [o1, o2, torch.randn(lam_shape, dtype=dtype)]
    results = []
    for function in (integral, lambda a, b, lam, layout: a + lam * (running_mean(a, layout) - b)):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = function(*leaves, layout)
        assert out.dtype == dtype
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mask", [None, DocumentMask([[100, 300], [400]])])
def test_later_rows_and_other_documents_change_no_bit(mask):
    layout = Layout(mask, None, num_queries=400)
    x = torch.randn(2, 4, 400, 8)
    before = running_mean(x, layout)
    changed = x.clone()
    changed[:, :, 250:] = 1e3 * torch.randn(2, 4, 150, 8)
    assert torch.equal(running_mean(changed, layout)[:, :, :250], before[:, :, :250])
    if mask is not None:
        changed = x.clone()
        changed[0, :, :100] = 1e3 * torch.randn(4, 100, 8)
        assert torch.equal(running_mean(changed, layout)[0, :, 100:], before[0, :, 100:])


def test_sums_in_float32_for_16_bit_input_and_under_autocast():
    x = torch.randn(1, 2, 4096, 4)
    layout = Layout(None, None, num_queries=4096)
    exact = running_mean(x.bfloat16().double(), layout)
    actual = running_mean(x.bfloat16(), layout)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, exact.bfloat16()) or (actual - exact).abs().max() < 2**-8 * exact.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(running_mean(x, layout), running_mean(x.double(), layout).float(), rtol=0, atol=1e-6)
