"""The gradients of a pack, and the mask that describes it. Outputs, for every method: test_methods_rows.py."""

import torch

from lrdint_tune.attention import DocumentMask
from tests.common.models import TINY, tiny_model, wake


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
