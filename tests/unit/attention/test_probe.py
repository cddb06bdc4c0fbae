"""The streamed rows of effective maps against the N x N float64 reference, everything a method can be built as."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lrdint_tune.attention import METHODS, Layout
from lrdint_tune.attention.probe import map_rows
from tests.common import reference
from tests.common.cases import CASES, DEFAULTS, STEP, MethodCase, case_and_heads
from tests.common.layouts import BATCH, LENGTH, Case, layout_case
from tests.common.models import TINY, attention_of, raw_weights, woken_model
from tests.common.reference import Rows, Sublayer

ROWS = 5  # neither divides the length nor falls on a document's begin
ON_FEATURES = ("dex", "diffv")  # no map but A1


class _WithIdentity(Sublayer):
    """Maps instead of outputs: the values of every key/value head are the identity."""

    def v(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        return torch.eye(n, dtype=x.dtype)[None, :, None].expand(b, n, self.num_kv_heads, n)


def dense_maps(attention: Any, x: Tensor, rows: Rows, case: MethodCase, *, layer: int = 0) -> tuple[Tensor, Tensor]:
    """M and A1 of the reference, [B, H, N, N] each."""
    weights, _ = raw_weights(attention)
    options = {name: value for name, value in case.options.items() if name != "sublayer_norm"}
    sizes = {"num_heads": attention.num_heads, "num_kv_heads": attention.num_kv_heads, "layer": layer, "step": STEP}
    s = _WithIdentity(x, weights, rows, options, **sizes)
    method = "none" if case.method in ON_FEATURES else case.method
    effective = torch.stack(reference.METHODS[method](s), dim=1)
    if case.method == "difflora":  # its first map has the adapters; without the second it is what is left
        weights = {**weights}
        first = torch.stack(reference.METHODS["difflora"](_first_alone(s)), dim=1)
    elif case.options.get("inside_softmax"):
        first = effective
    else:
        first = torch.stack(s.primary_maps(), dim=1)
    return effective.detach(), first.detach()


def _first_alone(s: Sublayer) -> Sublayer:
    options = {**s.options, "lam": "fixed", "lam_init": 0.0, "combine": "subtract"}
    return _WithIdentity(s.x, s.weights, s.rows, options, s.num_heads, s.num_kv_heads, layer=s.layer, step=s.step)


def streamed(attention: Any, x: Tensor, layout: Case, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """M, A1 and the allowed keys, put together from the blocks."""
    whole = Layout(layout.mask, layout.input_pos, num_queries=x.shape[1], batch_size=x.shape[0])
    blocks = list(map_rows(attention, x, whole, rows=rows))
    assert [block.begin for block in blocks] == list(range(0, x.shape[1], rows))
    return (
        torch.cat([block.effective for block in blocks], dim=2),
        torch.cat([block.first for block in blocks], dim=2),
        torch.cat([block.allowed for block in blocks], dim=1),
    )


def test_every_method_is_there() -> None:
    assert {case.method for case in CASES} == set(METHODS)


@pytest.mark.parametrize(("case", "heads"), case_and_heads())
def test_maps_equal_the_dense_reference(case: MethodCase, heads: str) -> None:
    attention = attention_of(woken_model(case, heads), 1)
    for name in case.layouts:
        layout = layout_case(name)
        x = torch.randn(BATCH, LENGTH, TINY["embed_dim"], dtype=torch.float64)
        effective, first, allowed = streamed(attention, x, layout)
        want, want_first = dense_maps(attention, x, layout.rows, case, layer=1)
        torch.testing.assert_close(effective, want, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(
            first, want_first, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"A1, {name}: {m}"
        )
        assert torch.equal(allowed.expand(BATCH, -1, -1), layout.rows.allowed), name


@pytest.mark.parametrize("case", [c for c in DEFAULTS if c.method not in ON_FEATURES], ids=str)
def test_map_times_values_is_the_output(case: MethodCase) -> None:
    """By the module's own forward, in float32 and without the reference."""
    attention = woken_model(case, "gqa").layers[0].attn
    layout = layout_case("packed")
    x = torch.randn(BATCH, LENGTH, TINY["embed_dim"])
    effective, _, _ = streamed(attention, x, layout)
    v = attention.v_proj(x).unflatten(-1, (TINY["num_kv_heads"], -1)).transpose(1, 2).repeat_interleave(2, dim=1)
    out = attention.output_proj((effective @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, attention(x, mask=layout.mask, input_pos=layout.input_pos), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_bfloat16_maps_are_float32(case: MethodCase) -> None:
    model = woken_model(case, "gqa")
    x = torch.randn(1, LENGTH, TINY["embed_dim"]).bfloat16()
    attention = attention_of(model, 0, torch.bfloat16)
    effective, first, _ = streamed(attention, x, Case(layout_case("causal").rows))
    want, want_first = dense_maps(attention, x.double(), _first_row(layout_case("causal").rows), case)
    assert effective.dtype == first.dtype == torch.float32
    torch.testing.assert_close(first.double(), want_first, rtol=0, atol=0.02)
    torch.testing.assert_close(effective.double(), want, rtol=0, atol=0.05 * want.abs().max().item())


def _first_row(rows: Rows) -> Rows:
    return Rows(rows.allowed[:1], rows.documents[:1], rows.positions[:1])


@contextmanager
def counted_calls(attention: Any, name: str) -> Iterator[list[int]]:
    calls: list[int] = []
    handle = getattr(attention, name).register_forward_hook(lambda module, args, out: calls.append(args[0].shape[1]))
    yield calls
    handle.remove()


def test_every_row_is_projected_once() -> None:
    attention = woken_model(next(c for c in DEFAULTS if c.method == "dint"), "gqa").layers[0].attn
    with counted_calls(attention, "q_proj") as rows, counted_calls(attention, "v_proj") as values:
        list(
            map_rows(
                attention, torch.randn(1, LENGTH, TINY["embed_dim"]), Layout(None, None, num_queries=LENGTH), rows=5
            )
        )
    assert rows == [5, 5, 2] and not values


def test_only_whole_sequences() -> None:
    with pytest.raises(ValueError, match="whole"):
        Layout(None, None, num_queries=4, offset=2).part(0, 2)
    with pytest.raises(ValueError, match="BlockMask"):
        block = layout_case("packed_block")
        Layout(block.mask, block.input_pos, num_queries=LENGTH).part(0, 2)
