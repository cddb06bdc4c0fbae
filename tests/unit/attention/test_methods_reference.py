"""The fast attention module against the N x N float64 reference: outputs and gradients, everything it can be built as.

One test per case and number of key/value heads goes through the layouts and backends; what no case reaches follows.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrdint_tune.attention import Backend, DocumentMask
from lrdint_tune.errors import ConfigError
from tests.common.cases import CASES, DEFAULTS, NO_FLEX, STEP, MethodCase, case_and_heads, exception
from tests.common.layouts import BLOCK_LAYOUTS, Case, layout_case
from tests.common.models import TINY, attention_of, raw_weights, tiny_model, woken_model
from tests.common.reference import Rows, reference_attention

LAYER = 1  # not 0, where an index that is not passed on would not show
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}
DINT = next(case for case in CASES if case.name == "dint-learned")


def expected(
    attention: nn.Module, x: Tensor, rows: Rows, case: MethodCase
) -> tuple[Tensor, dict[str, Tensor], dict[str, nn.Parameter]]:
    """The reference's output for the module's own tensors; gradients flow to the returned copies."""
    weights, parameters = raw_weights(attention)
    out = reference_attention(
        x,
        weights,
        rows,
        case.options,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        layer=LAYER,
        step=STEP,
    )
    return out, {name: weights[name] for name in parameters}, parameters


def close(got: Tensor, want: Tensor, what: str, **tolerance: float) -> None:
    torch.testing.assert_close(got, want, **(tolerance or TOLERANCE), msg=lambda m: f"{what}: {m}")


def inputs(layout: Case, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*layout.rows.documents.shape, TINY["embed_dim"]).to(dtype)


def compare(attention: nn.Module, case: MethodCase, layout: Case, backends: tuple[str, ...], name: str) -> None:
    """Outputs and every gradient agree in float64; nothing is NaN; rows without a key output exactly 0."""
    x_reference = inputs(layout).requires_grad_()
    want, weights, parameters = expected(attention, x_reference, layout.rows, case)
    downstream = torch.randn_like(want)
    (want * downstream).sum().backward()
    for backend in backends:
        where = f"{name}, {backend}"
        attention.backend = Backend.parse(backend)
        attention.zero_grad()
        x = x_reference.detach().clone().requires_grad_()
        got = attention(x, x, mask=layout.mask, input_pos=layout.input_pos)
        assert got.dtype == torch.float64 and torch.isfinite(got).all(), where
        close(got, want, where)
        assert (got[~layout.rows.valid] == 0).all(), where
        (got * downstream).sum().backward()
        close(x.grad, x_reference.grad, f"{where}, gradient of x")
        for tensor, parameter in parameters.items():
            want_gradient = weights[tensor].grad
            assert want_gradient is not None and parameter.grad is not None, f"{where}: {tensor}"
            assert want_gradient.abs().max() > 0, f"{where}: the comparison of {tensor} would be empty"
            close(parameter.grad, want_gradient, f"{where}, gradient of {tensor}")


@pytest.mark.parametrize(("case", "heads"), case_and_heads())
def test_forward_and_gradients(case: MethodCase, heads: str, covered: Any) -> None:
    attention = attention_of(woken_model(case, heads), LAYER)
    for layout in case.layouts:
        compare(attention, case, layout_case(layout), ("eager", "sdpa"), layout)
        covered("reference, gradients", case, heads, [layout], ["eager", "sdpa"])


def compare_flex(attention: nn.Module, case: MethodCase, layout: Case, name: str) -> None:
    """FlexAttention has no backward on CPU, and float32 only."""
    attention.to(torch.float32).backend = Backend.FLEX
    x = inputs(layout, torch.float32)
    with torch.no_grad():
        want, _, _ = expected(attention, x.double(), layout.rows, case)
        got = attention(x, x, mask=layout.mask, input_pos=layout.input_pos)
    close(got, want.float(), f"{name}, flex", rtol=1e-4, atol=2e-5)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("case", "heads"), case_and_heads())
def test_flex_forward(case: MethodCase, heads: str, covered: Any) -> None:
    attention = attention_of(woken_model(case, heads), LAYER)
    if exception(NO_FLEX, case):
        with pytest.raises(ConfigError, match="attention_backend='flex'"):
            compare_flex(attention, case, layout_case("causal"), "causal")
        return
    for layout in (*case.layouts, *BLOCK_LAYOUTS):
        compare_flex(attention, case, layout_case(layout), layout)
        covered("reference", case, heads, [layout], ["flex"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["causal", "packed"])
def test_flex_forward_compiled(layout: str) -> None:
    compare_flex(attention_of(woken_model(DINT, "gqa"), LAYER), DINT, layout_case(layout), layout)


@pytest.mark.parametrize("layout", DINT.layouts)
def test_auto_backend(layout: str) -> None:
    compare(attention_of(woken_model(DINT, "gqa"), LAYER), DINT, layout_case(layout), ("auto",), layout)


LONG = [
    MethodCase("dint", {"method": "dint", "rank": 3, "secondary_scale": "standard"}),
    MethodCase("lmam", {"method": "lmam", "n": 100, "scale": 0.01}),
    MethodCase("lmam-end", {"method": "lmam", "n": 100, "scale": 0.01, "alignment": "end"}),
]


@pytest.mark.parametrize("mask", ["documents", "dense"])
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_packed_rows(case: MethodCase, mask: str) -> None:
    """Documents shorter and longer than the blocks in which a fast path may work, not aligned to them."""
    lengths = [[70, 1, 129], [3, 64, 133]]
    documents = DocumentMask(lengths)
    labels = torch.tensor([[d for d, n in enumerate(row) for _ in range(n)] for row in lengths])
    positions = torch.tensor([[p for n in row for p in range(n)] for row in lengths])
    allowed = (labels[:, :, None] == labels[:, None, :]).tril()
    layout = Case(Rows(allowed, labels, positions), documents if mask == "documents" else allowed, positions)
    compare(attention_of(woken_model(case, "gqa"), LAYER), case, layout, ("sdpa",), mask)


def test_torchtune_layer_calls_it() -> None:
    """The module sits in torchtune's layer, and the float32 rotation of the model itself agrees with the reference."""
    case, layout = DINT, layout_case("packed")
    layer = woken_model(case, "gqa").double().layers[LAYER]
    x = inputs(layout)
    want, _, _ = expected(layer.attn, layer.sa_norm(x), layout.rows, case)
    got = layer(x, mask=layout.mask, input_pos=layout.input_pos)
    torch.testing.assert_close(got, x + want + layer.mlp(layer.mlp_norm(x + want)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [*DEFAULTS, *(case for case in CASES if case.lam == "sigmoid")], ids=str)
def test_bfloat16(case: MethodCase) -> None:
    """bf16 modules give bf16 results near the reference, whether or not lambda stays in fp32."""
    layout = layout_case("packed")
    attention = attention_of(woken_model(case, "gqa"), LAYER, torch.bfloat16)
    x = inputs(layout, torch.bfloat16)
    want, _, _ = expected(attention, x.double(), layout.rows, case)
    for lam_dtype in (torch.bfloat16, torch.float32) if case.lam else (torch.bfloat16,):
        if case.lam:
            attention.method.lam.to(lam_dtype)
        got = attention(x, x, mask=layout.mask, input_pos=layout.input_pos)
        assert got.dtype == torch.bfloat16
        close(got.double(), want, f"lambda in {lam_dtype}", rtol=0, atol=0.03 * want.abs().max().item())


def test_another_y_is_refused() -> None:
    attention = tiny_model(method="dint").layers[0].attn
    x = torch.randn(1, 5, TINY["embed_dim"])
    torch.testing.assert_close(attention(x), attention(x, x))
    with pytest.raises(ValueError, match="self-attention"):
        attention(x, x.clone())
