"""No output may depend on a later token, in sequences longer than a block either. `integral: sequence` fails that.

Short sequences, for every method: test_methods_rows.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from lrdint_tune.attention import DocumentMask
from tests.common.models import TINY, tiny_model, wake

LENGTH = 20
DINT = {"method": "dint", "rank": 3}
LITERAL = {**DINT, "integral": "sequence", "allow_future_leak": True}
LMAM = {"method": "lmam", "n": 100, "scale": 0.5}


def change_before_after(
    options: dict[str, Any], backend: str, first_changed: int, mask: Any, length: int = LENGTH
) -> tuple[Tensor, Tensor]:
    """Largest change of the logits before `first_changed` and at it, when every token from there on is replaced."""
    model = wake(tiny_model(attention_backend=backend, max_seq_len=length, **options))
    model.advance_schedule(4)
    tokens = torch.randint(TINY["vocab_size"], (2, length))
    changed = tokens.clone()
    changed[:, first_changed:] = (changed[:, first_changed:] + 7) % TINY["vocab_size"]
    with torch.no_grad():
        difference = (model(tokens, mask=mask) - model(changed, mask=mask)).abs()
    return difference[:, :first_changed].amax(), difference[:, first_changed].amax()


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("options", [DINT, LMAM], ids=["dint", "lmam"])
def test_long_sequences(options: dict[str, Any], backend: str, packed: bool) -> None:
    """Longer than the blocks in which a fast path may work; changes inside blocks and at their edges."""
    mask = DocumentMask([[30, 97, 1, 72], [200]]) if packed else None
    for first_changed in (5, 63, 64, 65, 128, 199):
        before, at = change_before_after(options, backend, first_changed, mask, length=200)
        assert before == 0, (first_changed, before)
        assert at > 1e-3


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_the_literal_integral_leaks(backend: str) -> None:
    before, _ = change_before_after(LITERAL, backend, 9, None)
    assert before > 1e-4


def test_the_literal_integral_leaks_within_a_document_only() -> None:
    model = wake(tiny_model(**LITERAL))
    tokens = torch.randint(TINY["vocab_size"], (1, LENGTH))
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 7) % TINY["vocab_size"]
    mask = DocumentMask([[8, 12]])
    with torch.no_grad():
        difference = (model(tokens, mask=mask) - model(changed, mask=mask)).abs().amax(-1)[0]
    assert difference[:8].amax() == 0
    assert difference[8:15].amin() > 0
