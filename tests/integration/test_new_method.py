"""CONTRIBUTING's worked example, registered as it says, is a method like the others."""

import re
import types
from pathlib import Path

import pytest
import torch

from lrdint_tune.attention import METHODS, DocumentMask
from lrdint_tune.models import LlamaDecoder
from tests.common.compiling import skip_inductor
from tests.common.models import TINY, tiny_model, wake
from tests.common.tiny_run import SIZES, write_run
from tests.distributed.harness import run_recipe

DOCUMENT = Path(__file__).parents[2] / "CONTRIBUTING.md"
TOKENS = torch.randint(TINY["vocab_size"], (2, 16), generator=torch.Generator().manual_seed(1))


def register() -> None:
    """Also called in the process of a run."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    module = types.ModuleType("temper")
    exec(code, vars(module))
    METHODS["temper"] = module.Temper


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> LlamaDecoder:
    monkeypatch.setitem(METHODS, "temper", METHODS["none"])  # so that it is forgotten after the test
    register()
    return tiny_model("temper", temperature=0.4)


def test_starts_as_the_base_and_learns(model: LlamaDecoder) -> None:
    plain = tiny_model()
    model.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), rtol=0, atol=1e-6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = dict.fromkeys(model.adapter_parameters(), 0.0)
    assert {name.split("method.")[1] for name in seen} == {"tau", "lam.value"}
    for _ in range(2):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS.roll(-1, 1)).backward()
        seen = {name: max(seen[name], p.grad.abs().max().item()) for name, p in model.adapter_parameters().items()}
        optimizer.step()
    assert min(seen.values()) > 1e-7


def test_masks_documents_and_caches_hold(model: LlamaDecoder) -> None:
    wake(model)
    changed = TOKENS.clone()
    changed[:, 9:] = (changed[:, 9:] + 7) % TINY["vocab_size"]
    with torch.no_grad():
        full = model(TOKENS)
        assert torch.equal(model(changed)[:, :9], full[:, :9])
        packed = model(TOKENS, mask=DocumentMask([[6, 10], [16]]))
        torch.testing.assert_close(packed[0, 6:], model(TOKENS[:1, 6:])[0], rtol=1e-4, atol=1e-5)
        model.setup_caches(2, torch.float32, decoder_max_seq_len=16)
        causal = torch.ones(2, 16, 16, dtype=torch.bool).tril()
        positions = torch.arange(16).expand(2, 16)
        spans = ((0, 7), (7, 8), (8, 16))
        pieces = [model(TOKENS[:, a:b], mask=causal[:, a:b], input_pos=positions[:, a:b]) for a, b in spans]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_trains_saves_and_exports(model: LlamaDecoder, tmp_path: Path, compiled: str) -> None:
    config = write_run(tmp_path, model={"_component_": "lrdint_tune.models.llama3_2", **SIZES, "method": "temper"})
    overrides = ("max_steps_per_epoch=2", "epochs=1", f"compile={compiled}")
    outcome = run_recipe(config, *overrides, prepare=[register, skip_inductor])
    assert outcome.codes == [0], outcome.outputs
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
