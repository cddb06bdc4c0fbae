"""Bytes on the meta device are those that real tensors hold on the CPU."""

import torch
import torch.nn.functional as F

from lrdint_tune.attention import Layout
from lrdint_tune.planning.trace import Held, Kernels, storage_bytes
from tests.common.models import tiny_model

KIB = 1024


def test_counts_what_is_held() -> None:
    with Held([]) as held:
        a = torch.empty(256, device="meta")
        b = a + 1
        view = b[:4]
        del b
        assert held.now == 2 * KIB  # the view holds its whole storage
        del view
        assert held.now == KIB and held.peak == 2 * KIB
        held.restart()
        assert held.peak == KIB
        del a
    assert held.now == 0


def test_what_was_there_before_is_not_counted() -> None:
    weight = torch.empty(16, 16, device="meta")
    with Held([weight]) as held:
        transposed = weight.T
        assert held.now == 0
        del transposed


def test_kept_for_the_backward_pass() -> None:
    x = torch.empty(256, device="meta", requires_grad=True)
    with Held([x]) as held:
        y = x.exp()  # keeps its result
        z = y.sin()  # and its input
        del y
        assert held.now == 2 * KIB
        z.backward(torch.empty_like(z))
        del z
        assert held.now == KIB  # the gradient
    assert held.peak >= 4 * KIB


def test_gradients_are_counted_apart() -> None:
    weight = torch.nn.Parameter(torch.empty(16, 16, device="meta"))
    x = torch.empty(4, 16, device="meta")
    with Held([weight, x], [weight]) as held:
        F.linear(x, weight).sum().backward()
        assert held.gradients() == KIB
        extra = torch.empty(4 * KIB, device="meta")
        assert held.gradients_at_peak == KIB
        del extra


def test_storages_of_views_count_once() -> None:
    a = torch.empty(8, 8)
    assert storage_bytes([a, a[0], a.T]) == 256


def test_a_block_holds_what_it_holds_on_the_cpu() -> None:
    """The same block, forward and backward, on both devices."""
    found = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            layer = tiny_model("dint", rank=2).layers[0]
            x = torch.empty(2, 48, 24, requires_grad=True)
        layout = Layout(None, None, num_queries=48, batch_size=2, device=device)
        with Held([x, *layer.parameters(), *layer.buffers()]) as held:
            if device == "meta":
                with Kernels("cpu", flex=False):
                    out = layer(x, mask=layout)
            else:
                out = layer(x, mask=layout)
            kept = held.now
            out.backward(torch.empty_like(out))
        found.append((kept, held.peak))
    assert found[0] == found[1]


def test_no_map_is_held() -> None:
    """Neither on the CPU nor on a GPU, with or without a mask and in both dtypes, is anything ``N x N``."""
    n, hd = 512, 8
    map_bytes = n * n * 4
    for device, flex, dtype in (
        ("cpu", False, torch.float32),
        ("cuda", False, torch.bfloat16),
        ("cuda", False, torch.float32),
        ("cuda", True, torch.bfloat16),
    ):
        q = torch.empty(1, 4, n, hd, dtype=dtype, device="meta", requires_grad=True)
        k = torch.empty(1, 2, n, hd, dtype=dtype, device="meta", requires_grad=True)
        with Kernels(device, flex=flex), Held([q, k]) as held:
            out = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
            assert out.shape == q.shape
            out.backward(torch.empty_like(out))
        assert held.peak < map_bytes, (device, flex, dtype)
        assert k.grad is not None and k.grad.shape == k.shape


def test_fused_norm_keeps_less() -> None:
    x = torch.empty(64, 128, device="meta", requires_grad=True)
    weight = torch.empty(128, device="meta", requires_grad=True)
    kept = {}
    for device in ("cpu", "cuda"):
        with Kernels(device, flex=False), Held([x, weight]) as held:
            out = F.rms_norm(x, (128,), weight, 1e-5)
            kept[device] = held.now
            out.backward(torch.empty_like(out))
        assert x.grad is not None and weight.grad is not None
    assert kept["cuda"] < kept["cpu"]
