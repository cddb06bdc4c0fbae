"""The chunked loss is torch's cross entropy, in value and gradients, and never holds the logits whole."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrdint_tune.models import loss as loss_module
from lrdint_tune.models.loss import IGNORE_INDEX, summed_cross_entropy


def inputs(dtype: torch.dtype, tokens: int = 30, vocab: int = 50) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h = torch.randn(2, tokens // 2, 8).to(dtype).requires_grad_()
    weight = torch.randn(vocab, 8).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (2, tokens // 2))
    labels[torch.rand(labels.shape) < 0.3] = IGNORE_INDEX
    return h, weight, labels


def plain(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(
        (h @ weight.T).flatten(0, 1).to(torch.promote_types(h.dtype, torch.float32)), labels.flatten(), reduction="sum"
    )


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_value_and_gradients(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    h, weight, labels = inputs(torch.float64)
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", rows * weight.shape[0])
    ours, expected = summed_cross_entropy(h, weight, labels), plain(h, weight, labels)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(3 * ours, (h, weight)), torch.autograd.grad(3 * expected, (h, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_frozen_head_gets_no_gradient() -> None:
    h, weight, labels = inputs(torch.float64)
    weight.requires_grad_(False)
    summed_cross_entropy(h, weight, labels).backward()
    expected = torch.autograd.grad(plain(h, weight, labels), h)[0]
    torch.testing.assert_close(h.grad, expected, rtol=0, atol=1e-12)
    assert weight.grad is None


def test_bf16_sum_is_float32() -> None:
    h, weight, labels = inputs(torch.bfloat16, tokens=2000, vocab=300)
    ours, expected = summed_cross_entropy(h, weight, labels), plain(h, weight, labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def test_nothing_labelled_is_zero() -> None:
    h, weight, labels = inputs(torch.float32)
    loss = summed_cross_entropy(h, weight, torch.full_like(labels, IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0 and not h.grad.any() and not weight.grad.any()


class LargestTensor(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


def test_logits_never_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", 20 * 5000)
    h, weight, labels = inputs(torch.float32, tokens=400, vocab=5000)
    with LargestTensor() as seen:
        summed_cross_entropy(h, weight, labels).backward()
    assert 0 < seen.largest <= 20 * 5000
