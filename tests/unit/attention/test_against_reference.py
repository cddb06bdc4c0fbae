"""The fast attention module against the N x N float64 reference: outputs and gradients, everything it can be built as.

Two sweeps share one comparison: (heads x layout x method x backend) with default options, and every combination of
the options of `diff` and `dint` on one packed GQA batch.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from lrdint_tune.attention import DocumentMask
from lrdint_tune.models.decoder import LlamaDecoder
from tests.common.layouts import BATCH, BLOCK_LAYOUTS, LAYOUTS, LENGTH, Case, layout_case
from tests.common.models import TINY, attention_of, raw_weights, tiny_model, wake
from tests.common.reference import Rows, reference_attention, reference_lambda

HEADS = {"mha": 4, "gqa": 2, "mqa": 1}
METHODS: dict[str, dict[str, Any]] = {
    "none": {"method": "none"},
    "diff": {"method": "diff", "rank": 3},
    "dint": {"method": "dint", "rank": 3},
    "dint_sequence": {"method": "dint", "rank": 3, "integral": "sequence", "allow_future_leak": True},
}
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


def build(**options: Any) -> LlamaDecoder:
    """A one-layer model with lambda away from 0."""
    return wake(tiny_model(num_layers=1, **options))


def expected(
    model: LlamaDecoder, x: Tensor, case: Case, options: dict[str, Any], step: int = 0
) -> tuple[Tensor, dict[str, Tensor], dict[str, torch.nn.Parameter]]:
    """The reference's output for the model's own tensors; gradients flow to the returned copies."""
    attention = model.layers[0].attn
    weights, parameters = raw_weights(attention)
    inputs = dict(weights)
    if options["method"] != "none":
        form = options.get("lam", "learned")
        p = inputs.get("lam", torch.zeros(1, dtype=torch.float64))
        inputs["lam"] = reference_lambda(
            form,
            p,
            lam_init=options.get("lam_init", {"annealed": 0.8, "fixed": 0.1, "learned": 0.0}[form]),
            step=step,
            anneal_steps=options.get("anneal_steps", 1000),
        )
    out = reference_attention(
        x,
        inputs,
        case.rows,
        method=options["method"],
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        secondary_scale=options.get("secondary_scale", "seed"),
        integral=options.get("integral", "causal"),
    )
    return out, weights, parameters


def compare(options: dict[str, Any], case: Case, step: int = 0) -> None:
    """Outputs and every gradient agree in float64; nothing is NaN; rows without a key output exactly 0."""
    model = build(**options)
    model.advance_schedule(step)
    attention = attention_of(model)
    x = torch.randn(*case.rows.documents.shape, TINY["embed_dim"], dtype=torch.float64, requires_grad=True)
    x_reference = x.detach().clone().requires_grad_()
    want, weights, parameters = expected(model, x_reference, case, options, step)
    got = attention(x, x, mask=case.mask, input_pos=case.input_pos)

    assert got.dtype == torch.float64 and torch.isfinite(got).all()
    torch.testing.assert_close(got, want, **TOLERANCE)
    assert (got[~case.rows.valid] == 0).all()

    downstream = torch.randn_like(got)
    (want * downstream).sum().backward()
    (got * downstream).sum().backward()
    torch.testing.assert_close(x.grad, x_reference.grad, **TOLERANCE, msg=lambda m: f"gradient of x: {m}")
    assert set(parameters) == set(weights)
    for name, parameter in parameters.items():
        want_gradient = weights[name].grad
        assert want_gradient is not None and parameter.grad is not None, name
        assert want_gradient.abs().max() > 0, f"the comparison of {name} would be empty"
        torch.testing.assert_close(
            parameter.grad, want_gradient, **TOLERANCE, msg=lambda m, name=name: f"gradient of {name}: {m}"
        )


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", HEADS)
def test_every_layout(heads: str, layout: str, method: str, backend: str) -> None:
    options = {**METHODS[method], "num_kv_heads": HEADS[heads], "attention_backend": backend}
    compare(options, layout_case(layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_auto_backend(layout: str) -> None:
    compare({**METHODS["dint"], "attention_backend": "auto"}, layout_case(layout))


@pytest.mark.parametrize("mask", ["documents", "dense"])
def test_long_packed_rows(mask: str) -> None:
    """Documents shorter and longer than the blocks in which a fast path may work, not aligned to them."""
    lengths = [[70, 1, 129], [3, 64, 133]]
    documents = DocumentMask(lengths)
    labels = torch.tensor([[d for d, n in enumerate(row) for _ in range(n)] for row in lengths])
    positions = torch.tensor([[p for n in row for p in range(n)] for row in lengths])
    allowed = (labels[:, :, None] == labels[:, None, :]).tril()
    case = Case(Rows(allowed, labels, positions), documents if mask == "documents" else allowed, positions)
    compare({"method": "dint", "rank": 3, "secondary_scale": "standard"}, case)


@pytest.mark.parametrize("scale", ["seed", "variance", "standard", 0.37])
@pytest.mark.parametrize("factors", ["per_head", "shared", "full"])
@pytest.mark.parametrize("lam", ["learned", "learned_layer", "annealed", "annealed_layer", "fixed"])
@pytest.mark.parametrize("method", ["diff", "dint"])
def test_every_option(method: str, lam: str, factors: str, scale: str | float) -> None:
    form, _, sharing = lam.partition("_")
    options: dict[str, Any] = {"method": method, "lam": form, "secondary_scale": scale}
    if sharing:
        options["lam_sharing"] = sharing
    if form == "annealed":
        options |= {"anneal_steps": 10, "lam_init": 0.5}
    if form == "fixed":
        options |= {"lam_init": -0.3125}
    options |= {"rank": None} if factors == "full" else {"rank": 3, "factors": factors}
    compare(options, layout_case("packed"), step=4)


def compare_flex(heads: str, method: str, layout: str) -> None:
    """FlexAttention has no backward on CPU, and float32 only."""
    options = {**METHODS[method], "num_kv_heads": HEADS[heads], "attention_backend": "flex"}
    case = layout_case(layout)
    model = build(**options)
    attention = attention_of(model, dtype=torch.float32)
    x = torch.randn(BATCH, LENGTH, TINY["embed_dim"])
    with torch.no_grad():
        want, _, _ = expected(model, x.double(), case, options)
        got = attention(x, x, mask=case.mask, input_pos=case.input_pos)
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=2e-6)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("layout", [*LAYOUTS, *BLOCK_LAYOUTS])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("heads", HEADS)
def test_flex_forward(heads: str, method: str, layout: str) -> None:
    compare_flex(heads, method, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["causal", "packed"])
def test_flex_forward_compiled(layout: str) -> None:
    compare_flex("gqa", "dint", layout)


def test_torchtune_layer_calls_it() -> None:
    """The module sits in torchtune's layer, and the float32 rotation of the model itself agrees with the reference."""
    options = {"method": "dint", "rank": 3}
    model = build(**options).double()
    layer, case = model.layers[0], layout_case("packed")
    x = torch.randn(BATCH, LENGTH, TINY["embed_dim"], dtype=torch.float64)
    normed = layer.sa_norm(x)
    want, _, _ = expected(model, normed, case, options)
    got = layer(x, mask=case.mask, input_pos=case.input_pos)
    torch.testing.assert_close(got, x + want + layer.mlp(layer.mlp_norm(x + want)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lam_dtype", [torch.bfloat16, torch.float32], ids=["lam_bf16", "lam_fp32"])
def test_bfloat16(lam_dtype: torch.dtype) -> None:
    """bf16 modules give bf16 results near the reference, whether or not lambda stays in fp32."""
    options = {"method": "dint", "rank": 3, "secondary_scale": "standard"}
    model, case = build(**options), layout_case("packed")
    attention = attention_of(model, dtype=torch.bfloat16)
    attention.method.lam.to(lam_dtype)
    x = torch.randn(BATCH, LENGTH, TINY["embed_dim"]).to(torch.bfloat16)
    want, _, _ = expected(model, x.double(), case, options)
    got = attention(x, x, mask=case.mask, input_pos=case.input_pos)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=0, atol=0.02 * want.abs().max().item())


def test_another_y_is_refused() -> None:
    attention = build(method="dint").layers[0].attn
    x = torch.randn(1, 5, TINY["embed_dim"])
    torch.testing.assert_close(attention(x), attention(x, x))
    with pytest.raises(ValueError, match="self-attention"):
        attention(x, x.clone())
