"""Which rows a row depends on: none that come later, none of other documents or padding, and the same ones whether
they come at once or piece by piece through the cache."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.common.cases import (
    CASES,
    DEFAULTS,
    LEAKS,
    MAIN_LAYOUTS,
    NO_CACHE,
    NO_FLEX,
    SEES_THE_LENGTH,
    MethodCase,
    case_and_heads,
    exception,
)
from tests.common.layouts import BATCH, LENGTH, layout_case
from tests.common.models import TINY, set_backend, woken_model

CACHE = LENGTH + 3


def backends(case: MethodCase, heads: str) -> tuple[str, ...]:
    """flex, which is slow where it is not compiled, only for every method once."""
    flex = heads == "gqa" and case in DEFAULTS and not exception(NO_FLEX, case)
    return ("eager", "sdpa", "flex") if flex else ("eager", "sdpa")


def random_tokens() -> Tensor:
    return torch.randint(TINY["vocab_size"], (BATCH, LENGTH))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("case", "heads"), case_and_heads([case for case in CASES if not exception(LEAKS, case)]))
@torch.no_grad()
def test_outputs_before_a_change_are_bit_equal(case: MethodCase, heads: str, covered: Any) -> None:
    model, tokens = woken_model(case, heads), random_tokens()
    for backend in backends(case, heads):
        set_backend(model, backend)
        for name in MAIN_LAYOUTS:
            layout = layout_case(name)
            before = model(tokens, mask=layout.mask, input_pos=layout.input_pos)
            for first in (1, 6, LENGTH - 1):
                changed = tokens.clone()
                changed[:, first:] = (changed[:, first:] + 7) % TINY["vocab_size"]
                after = model(changed, mask=layout.mask, input_pos=layout.input_pos)
                assert torch.equal(after[:, :first], before[:, :first]), (name, backend, first)
                assert (after[:, first] - before[:, first]).abs().max() > 1e-3
            covered("causality", case, heads, [name], [backend])


@pytest.mark.parametrize(("case", "heads"), case_and_heads())
@torch.no_grad()
def test_a_text_that_goes_on_does_not_change_its_beginning(case: MethodCase, heads: str, covered: Any) -> None:
    model, tokens = woken_model(case, heads), random_tokens()
    difference = (model(tokens)[:, :7] - model(tokens[:, :7])).abs().max()
    if exception(SEES_THE_LENGTH, case) and case.options.get("n", 0) < LENGTH:  # a wider map lies the same way
        assert difference > 1e-3
    else:
        assert difference < 1e-5
    covered("causality", case, heads, ["causal"], ["sdpa"])


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("case", "heads"), case_and_heads())
@torch.no_grad()
def test_every_document_is_as_it_is_alone(case: MethodCase, heads: str, covered: Any) -> None:
    """Packed, padded on the left or right: the logits of the document by itself."""
    model, tokens = woken_model(case, heads), random_tokens()
    for name in ("packed", "packed_dense", "left_padded", "right_padded"):
        layout = layout_case(name)
        documents = [(b, rows) for b in range(BATCH) for rows in layout.rows.members(b)]
        alone = [set_backend(model, "sdpa")(tokens[b, rows][None])[0] for b, rows in documents]
        for backend in backends(case, heads):
            got = set_backend(model, backend)(tokens, mask=layout.mask, input_pos=layout.input_pos)
            for (b, rows), want in zip(documents, alone, strict=True):
                torch.testing.assert_close(
                    got[b, rows], want, rtol=1e-4, atol=1e-5, msg=lambda m, n=(name, backend, rows): f"{n}: {m}"
                )
            covered("packing", case, heads, [name], [backend])


@pytest.mark.parametrize(("case", "heads"), case_and_heads([case for case in CASES if not exception(NO_CACHE, case)]))
@torch.no_grad()
def test_cached_decoding_equals_one_forward(case: MethodCase, heads: str, covered: Any) -> None:
    """A prefill, single tokens and chunks; then token by token. The left padding ends inside the prefill or later."""
    model, tokens = woken_model(case, heads).eval(), random_tokens()
    layouts = {name: layout_case(name) for name in ("causal_dense", "left_padded")}
    full = {
        name: set_backend(model, "sdpa")(tokens, mask=layout.mask, input_pos=layout.rows.positions)
        for name, layout in layouts.items()
    }
    model.setup_caches(BATCH, torch.float32, decoder_max_seq_len=CACHE)
    for name, layout in layouts.items():
        real, allowed = layout.rows.valid, F.pad(layout.rows.allowed, (0, CACHE - LENGTH))
        for backend in ("eager", "sdpa"):
            set_backend(model, backend)
            for pieces in ([5, 1, 1, 3, 2], [1] * LENGTH):
                model.reset_caches()
                out = []
                for tokens_, mask, positions in zip(
                    tokens.split(pieces, 1),
                    allowed.split(pieces, 1),
                    layout.rows.positions.split(pieces, 1),
                    strict=True,
                ):
                    out.append(model(tokens_, mask=mask, input_pos=positions))
                got = torch.cat(out, dim=1)
                assert torch.isfinite(got).all()
                torch.testing.assert_close(
                    got[real], full[name][real], rtol=1e-4, atol=1e-5, msg=lambda m, n=(name, backend): f"{n}: {m}"
                )
            covered("decoding", case, heads, [name], [backend])
