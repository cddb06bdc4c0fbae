"""The methods in a host against their formulas, with whole maps in memory, in float64 and with λ away from 0."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from lrdint_tune.hosts import attach, methods
from tests.common.hosts import HEADS, SUPPORTED, WIDTH, inputs, right_padded, tiny, tokens, wake

REFERENCE = "lrdint_tune_test_reference"


def reference(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Whole maps; a module without a method is plain attention."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    b, h, n, m = *q.shape[:3], k.shape[2]
    allowed = mask if mask is not None else torch.ones(n, m, dtype=torch.bool).tril() if module.is_causal else None
    allowed = torch.ones(b, 1, n, m, dtype=torch.bool) if allowed is None else allowed.expand(b, 1, n, m)

    def attention_map(queries: Tensor) -> Tensor:
        logits = (queries @ k.transpose(-1, -2) * scaling).masked_fill(~allowed, float("-inf"))
        return logits.softmax(-1).nan_to_num(0.0)

    a = attention_map(q)
    method = getattr(module, "method", None)
    if method is None or method.name == "none":
        out = a @ v
    elif method.name == "lmam":
        out = (a + static(method, allowed, module.is_causal, h)) @ v
    else:
        lam = method.lam.value.double().view(-1, 1, 1)
        if method.name == "daa":
            out = (a - lam * attention_map(torch.einsum("bhnd,hde->bhne", q, method.w_daa))) @ v
        else:
            assert method.name == "dex"
            out = a @ v @ (torch.eye(q.shape[-1]) - lam * method.w_dex)
    return out.transpose(1, 2).contiguous(), None


def static(method: Any, allowed: Tensor, causal: bool, heads: int) -> Tensor:
    """LMAM's map as ``[B, H, N, N]``: entry by entry."""
    maps = method.maps()
    h_s, n, _ = maps.shape
    b, _, rows, _ = allowed.shape
    own = allowed[:, 0].diagonal(dim1=1, dim2=2)  # padding does not see itself
    out = torch.zeros(b, heads, rows, rows, dtype=maps.dtype)
    for row in range(b):
        real = own[row].nonzero().flatten().tolist()
        for i, place_i in enumerate(real[:n]):
            for j, place_j in enumerate(real[:n]):
                if j <= i or not causal:
                    for head in range(heads):
                        out[row, head, place_i, place_j] = maps[head % h_s, i, j]
    return out


AttentionInterface.register(REFERENCE, reference)
AttentionMaskInterface.register(REFERENCE, sdpa_mask)


@pytest.mark.parametrize("host", ["gpt2", "llama", "roberta", "bart"])
@pytest.mark.parametrize("method", ["daa", "dex", "lmam"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_whole_maps(host: str, method: str, padding: str) -> None:
    options = {"n": 5, "heads": 2, "scale": 1.0} if method == "lmam" else {}
    changes = {"scale_attn_by_inverse_layer_idx": True} if host == "gpt2" else {}  # the scale is the module's own
    model = attach(tiny(host, **changes), method, **{**SUPPORTED[host][method], **options})
    wake(model)
    slow = copy.deepcopy(model)
    slow.set_attn_implementation(REFERENCE)
    ids, mask = tokens(), None
    if padding != "none":
        ids, mask = right_padded(ids, 4)
    if padding == "left":
        ids, mask = ids.flip(1), mask.flip(1)
    given = inputs(host, ids, mask)
    got, expected = model(**given).logits, slow(**given).logits
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    plain = tiny(host, **changes)(**given).logits
    assert not torch.allclose(got, plain, atol=1e-3), "the branch sleeps"


@pytest.mark.parametrize("host", ["gpt2", "roberta", "bart"])
def test_diffv_folds_into_the_value_projection(host: str) -> None:
    """``v' = x (W_V - λ W_D W_V) + (1 - λ) b``: a stock model with that weight and bias."""
    model = attach(tiny(host), "diffv", lam_init=0.8)
    wake(model)
    stock = tiny(host)
    for (weight, bias), method in zip(value_projections(stock, host), methods(model), strict=True):
        lam = method.lam.value.double().repeat_interleave(WIDTH // HEADS)  # per output feature
        with torch.no_grad():
            weight.copy_(weight - lam * (method.w_d @ weight))
            bias.mul_(1 - lam)
    given = inputs(host, *right_padded(tokens(), 6))
    torch.testing.assert_close(model(**given).logits, stock(**given).logits, rtol=1e-9, atol=1e-9)


def value_projections(model: Any, host: str) -> list[tuple[Tensor, Tensor]]:
    """Views ``[in, out]`` and ``[out]`` of each layer's value weight and bias."""
    if host == "gpt2":
        last = slice(2 * WIDTH, None)
        return [(b.attn.c_attn.weight[:, last], b.attn.c_attn.bias[last]) for b in model.transformer.h]
    if host == "roberta":
        modules = [layer.attention.self.value for layer in model.roberta.encoder.layer]
    else:
        modules = [layer.self_attn.v_proj for layer in (*model.model.encoder.layers, *model.model.decoder.layers)]
    return [(module.weight.T, module.bias) for module in modules]


def test_diffq_has_the_bias_in_both_queries() -> None:
    """One layer of GPT-2 by hand: ``q2 = (x W_D) W_Q + b``."""
    model = attach(tiny("gpt2", n_layer=1), "diffq", lam_sharing="layer")
    wake(model)
    attention = model.transformer.h[0].attn
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    weight, bias, w_d = attention.c_attn.weight, attention.c_attn.bias, attention.method.w_d
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (x @ weight + bias).split(WIDTH, -1))
    q2 = (x @ w_d @ weight[:, :WIDTH] + bias[:WIDTH]).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    a1, a2 = (
        (p @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).masked_fill(future, float("-inf")).softmax(-1)
        for p in (q, q2)
    )
    out = ((a1 - attention.method.lam.value.double() * a2) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x)[0], attention.c_proj(out), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("option", ["inside_softmax", "softmax_map", "full_rank"])
@pytest.mark.parametrize("host", ["gpt2", "roberta"])
def test_lmam_ablations(option: str, host: str) -> None:
    """¬N, ¬S and ¬L as seed 004 defines them, on the first layer's attention, with padding on the right."""
    n, length = 5, 8
    model = attach(tiny(host), "lmam", n=n, scale=1.0, **{option: True})
    wake(model)
    attention = model.transformer.h[0].attn if host == "gpt2" else model.roberta.encoder.layer[0].attention.self
    causal = host == "gpt2"
    real = torch.tensor([4, length])
    own = torch.arange(length) < real[:, None]
    allowed = own[:, None, None] & (torch.ones(length, length, dtype=torch.bool).tril() | (not causal))
    q, k, v = torch.randn(3, 2, HEADS, length, WIDTH // HEADS, dtype=torch.float64)
    attention.slot.x = torch.zeros(2, length, WIDTH, dtype=torch.float64)
    got, _ = AttentionInterface()["lrdint_tune"](attention, q, k, v, allowed, scaling=attention.scaling)

    maps = attention.method.maps()
    dense = torch.zeros(2, HEADS, length, length, dtype=torch.float64)
    dense[..., :n, :n] = maps
    logits = q @ k.transpose(-1, -2) * attention.scaling
    a1 = logits.masked_fill(~allowed, float("-inf")).softmax(-1)
    if option == "inside_softmax":
        expected = (logits + dense).masked_fill(~allowed, float("-inf")).softmax(-1) @ v
    elif option == "softmax_map":
        inside = allowed.clone().expand(2, 1, length, length).clone()
        inside[..., n:], inside[:, :, n:] = False, False
        expected = (a1 + dense.masked_fill(~inside, float("-inf")).softmax(-1).nan_to_num(0.0)) @ v
    else:
        expected = (a1 + dense * allowed) @ v
    expected = expected.transpose(1, 2)
    torch.testing.assert_close(got[own], expected[own], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("host", ["gpt2", "roberta", "bart", "llama"])
def test_bottleneck_is_parallel_to_the_ffn(host: str) -> None:
    """``FFN(x) + s up(ReLU(down(x)))``, inside the residual connection, and nothing at the start."""
    plain = tiny(host)
    model = attach(tiny(host), "none", adapters=[{"type": "bottleneck", "rank": 3, "scale": 2.0}])
    given = inputs(host, tokens())
    assert torch.equal(model(**given).logits, plain(**given).logits)
    wake(model)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    if host == "gpt2":
        ffn, base = model.transformer.h[0].mlp, plain.transformer.h[0].mlp(x)
        got, holder = ffn(x), ffn
    elif host == "llama":
        ffn, base = model.model.layers[0].mlp, plain.model.layers[0].mlp(x)
        got, holder = ffn(x), ffn
    elif host == "roberta":
        layer, stock = model.roberta.encoder.layer[0], plain.roberta.encoder.layer[0]
        got, holder = layer.output.dense(layer.intermediate(x)), layer.output.dense
        base = stock.output.dense(stock.intermediate(x))
    else:
        layer, stock = model.model.encoder.layers[0], plain.model.encoder.layers[0]
        got, holder = layer.fc2(layer.fc1(x).relu()), layer.fc2
        base = stock.fc2(stock.fc1(x).relu())
    adapter = holder.bottleneck.adapter
    expected = base + 2.0 * adapter.up(adapter.down(x).relu())
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model(**given).logits, plain(**given).logits, atol=1e-3)
