"""`running_mean` and `document_mean` against loops over rows."""

import pytest
import torch
from torch import Tensor

from lrdint_tune.attention import DocumentMask, Layout, RunningState, document_mean, running_mean
from tests.common.layouts import BATCH, BLOCK_LAYOUTS, DOCUMENTS, LAYOUTS, LENGTH, Case, layout_case

HEADS, HEAD_DIM = 3, 4


def means_by_loops(o: Tensor, case: Case, causal: bool) -> Tensor:
    """Mean over the valid rows of each row's document, up to the row itself when `causal`; 0 for rows without keys."""
    rows, out = case.rows, torch.zeros_like(o)
    for b in range(o.shape[0]):
        for i in range(o.shape[2]):
            last = i if causal else o.shape[2] - 1
            same = [m for m in range(last + 1) if rows.documents[b, m] == rows.documents[b, i] and rows.valid[b, m]]
            if same and rows.valid[b, i]:
                out[b, :, i] = o[b, :, same].mean(1)
    return out


def random_outputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(BATCH, HEADS, LENGTH, HEAD_DIM, dtype=dtype)


def layout_of(case: Case) -> Layout:
    return Layout(case.mask, case.input_pos, num_queries=LENGTH)


@pytest.mark.parametrize("causal", [True, False], ids=["running", "document"])
@pytest.mark.parametrize("name", [*LAYOUTS, *BLOCK_LAYOUTS])
def test_means(name: str, causal: bool) -> None:
    case, o = layout_case(name), random_outputs()
    o = o.masked_fill(~case.rows.valid[:, None, :, None], 0)  # as attention leaves the rows without keys
    got = (running_mean if causal else document_mean)(o, layout_of(case))
    torch.testing.assert_close(got, means_by_loops(o, case, causal), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False], ids=["running", "document"])
@pytest.mark.parametrize("name", ["left_padded", "right_padded", "hole"])
def test_rows_without_keys_are_not_counted(name: str, causal: bool) -> None:
    """Whatever stands in a padded row, no other row's mean depends on it."""
    case, o = layout_case(name), random_outputs()
    garbage = torch.where(case.rows.valid[:, None, :, None], o, 1e6)
    mean = running_mean if causal else document_mean
    real = case.rows.valid[:, None, :, None].expand_as(o)
    got = mean(garbage, layout_of(case))[real]
    torch.testing.assert_close(got, means_by_loops(o, case, causal)[real], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["causal", "causal_dense", "packed", "packed_dense"])
def test_bf16_input_is_accumulated_in_float32(name: str) -> None:
    """4096 rows around 1: a bf16 sum would stop growing at 256."""
    n = 4096
    o = (1 + 0.1 * torch.randn(1, 2, n, 4)).to(torch.bfloat16)
    documents = DocumentMask([[n]] if "causal" in name else [[n - 1000, 1000]])
    mask = {"causal": None, "packed": documents}.get(name, documents.to_dense("cpu"))
    got = running_mean(o, Layout(mask, documents.input_pos("cpu"), num_queries=n))
    assert got.dtype == torch.bfloat16
    want = torch.cat(
        [
            part.double().cumsum(2) / torch.arange(1.0, part.shape[2] + 1)[:, None]
            for part in o.split(documents.lengths[0], 2)
        ],
        dim=2,
    )
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=0)


@pytest.mark.parametrize("name", ["causal", "packed_dense", "left_padded", "right_padded", "hole"])
@pytest.mark.parametrize("pieces", [[5, 1, 1, 3, 2], [1] * LENGTH, [LENGTH]])
def test_state_carries_the_mean_over_calls(name: str, pieces: list[int]) -> None:
    case, o = layout_case(name), random_outputs()
    o = o.masked_fill(~case.rows.valid[:, None, :, None], 0)
    state = RunningState(torch.zeros(BATCH, HEADS, HEAD_DIM, dtype=torch.float64), torch.zeros(BATCH).double())
    out, start = [], 0
    for length in pieces:
        end = start + length
        mask = None if case.mask is None else case.mask[:, start:end]
        layout = Layout(mask, None, num_queries=length, offset=start)
        out.append(running_mean(o[:, :, start:end], layout, state))
        start = end
    torch.testing.assert_close(torch.cat(out, 2), means_by_loops(o, case, True), rtol=1e-12, atol=1e-12)


def test_a_document_is_not_disturbed_by_the_one_before() -> None:
    """Huge values in an earlier document leave no rounding error in a later one."""
    case, o = layout_case("packed"), random_outputs(torch.float32)
    first = DOCUMENTS[0][0]
    big = o.clone()
    big[0, :, :first] *= 1e6
    calm, disturbed = running_mean(o, layout_of(case)), running_mean(big, layout_of(case))
    assert torch.equal(calm[0, :, first:], disturbed[0, :, first:])


def test_gradients() -> None:
    o = random_outputs()[:, :1, :, :2].clone().requires_grad_()
    for name in ("causal", "packed", "packed_dense", "left_padded"):
        layout = layout_of(layout_case(name))
        assert torch.autograd.gradcheck(lambda t, layout=layout: running_mean(t, layout), (o,))
        assert torch.autograd.gradcheck(lambda t, layout=layout: document_mean(t, layout), (o,))
