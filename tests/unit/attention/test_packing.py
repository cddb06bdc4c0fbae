"""A pack of documents computes, for every document, what the document computes alone."""

from typing import Any

import pytest
import torch

from lrdint_tune.attention import DocumentMask
from tests.common.models import TINY, tiny_model, wake

METHODS: dict[str, dict[str, Any]] = {
    "none": {"method": "none"},
    "diff": {"method": "diff", "rank": 3},
    "dint": {"method": "dint", "rank": 3},
    "dint_annealed": {"method": "dint", "rank": 3, "lam": "annealed", "anneal_steps": 10},
    "dint_sequence": {"method": "dint", "rank": 3, "integral": "sequence", "allow_future_leak": True},
}
LENGTHS = [[6, 1, 9], [11, 5]]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("with_positions", [True, False], ids=["restarting", "running"])
@pytest.mark.parametrize("dense", [False, True], ids=["document_mask", "dense_mask"])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex"])
@pytest.mark.parametrize("method", METHODS)
def test_packed_equals_unpacked(method: str, backend: str, dense: bool, with_positions: bool) -> None:
    model = wake(tiny_model(attention_backend=backend, **METHODS[method]))
    model.advance_schedule(4)
    documents = DocumentMask(LENGTHS)
    tokens = torch.randint(TINY["vocab_size"], (2, 16))
    positions = documents.input_pos("cpu") if with_positions else None
    with torch.no_grad():
        packed = model(tokens, mask=documents.to_dense("cpu") if dense else documents, input_pos=positions)
        for row, row_lengths in enumerate(LENGTHS):
            start = 0
            for length in row_lengths:
                alone = model(tokens[row : row + 1, start : start + length])
                torch.testing.assert_close(packed[row, start : start + length], alone[0], rtol=1e-4, atol=3e-6)
                start += length


def test_gradients_of_a_pack_are_the_sum_of_its_documents() -> None:
    model = wake(tiny_model(method="dint", rank=3, attention_backend="sdpa"))
    tokens = torch.randint(TINY["vocab_size"], (1, 16))
    labels = tokens.roll(-1, dims=1)
    labels[:, [5, 6, 15]] = -100
    model(tokens, mask=DocumentMask([[6, 1, 9]]), labels=labels).backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for start, end in ((0, 6), (7, 16)):
        model(tokens[:, start:end], labels=labels[:, start:end]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            packed[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_document_mask() -> None:
    mask = DocumentMask([[2, 3], [5]])
    dense = mask.to_dense("cpu")
    assert dense.dtype == torch.bool and dense.shape == (2, 5, 5)
    want = torch.tensor(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]], dtype=torch.bool
    )
    assert torch.equal(dense[0], want)
    assert torch.equal(dense[1], torch.ones(5, 5, dtype=torch.bool).tril())
    assert torch.equal(mask.input_pos("cpu"), torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]))
