"""The statistics of attention maps against the same numbers taken from dense maps, and what they cost in memory."""

import json
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lrdint_tune.attention import DocumentMask, Layout
from lrdint_tune.attention.probe import map_rows
from lrdint_tune.evaluation.attention_maps import attention_statistics, layer_statistics, probe_layers
from tests.common.cases import DEFAULTS, MethodCase
from tests.common.models import TINY, tiny_model, woken_model

TOP_K = 3
LITERAL = MethodCase("literal", {"method": "dint", "integral": "sequence", "allow_future_leak": True})
LENGTHS = [70, 1, 33]  # longer than a block of rows


def dense_statistics(m: Tensor, allowed: Tensor, starts: list[int]) -> dict[str, list[float]]:
    """Row by row from one head's map m [N, N], in float64."""
    found: dict[str, list[float]] = {}
    for row, keys, start in zip(m.double(), allowed, starts, strict=True):
        size = row.abs()
        share = (size / size.sum())[size > 0]
        largest = size.sort(descending=True).values
        values = {
            "entropy": -sum(p * math.log(p) for p in share.tolist()),
            "first_token_mass": (size[start] / size.sum()).item(),
            "negative_share": (row[keys] < 0).double().mean().item(),
            "noise_to_signal": (largest[TOP_K:].sum() / largest[:TOP_K].sum()).item(),
            "future_mass": (size[~keys].sum() / size.sum()).item(),
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("case", [*DEFAULTS, LITERAL], ids=str)
def test_statistics_of_dense_maps(case: MethodCase) -> None:
    model = woken_model(case, "gqa", max_seq_len=128).eval()
    mask, n = DocumentMask([LENGTHS]), sum(LENGTHS)
    starts = [begin for begin, end in mask.spans()[0] for _ in range(begin, end)]
    tokens = torch.randint(TINY["vocab_size"], (1, n))
    inputs: list[Tensor] = []
    attention = model.attention(1)
    handle = attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    layers = probe_layers(model, tokens, TOP_K, mask=mask, heat_maps={1: [0, 3]})
    handle.remove()
    layout = Layout(mask, None, num_queries=n, batch_size=1)
    rows = list(map_rows(attention, inputs[0].detach(), layout, rows=n))[0]  # the dense map: all rows at once
    assert len(layers) == TINY["num_layers"]
    for maps, got in ((rows.effective, layers[1].effective), (rows.first, layers[1].first)):
        for head in range(TINY["num_heads"]):
            for name, values in dense_statistics(maps[0, head], rows.allowed[0], starts).items():
                assert got[name][head].item() == pytest.approx(sum(values) / n, rel=1e-4, abs=1e-6), (name, head)
    assert set(layers[1].heat_maps) == {0, 3} and layers[0].heat_maps == {}
    edges = [next(i for i in range(n + 1) if i * 64 // n >= c) for c in range(65)]
    for head, pooled in layers[1].heat_maps.items():
        for i in (0, 17, 63):
            for j in (0, 17, 40):
                cell = rows.effective[0, head, edges[i] : edges[i + 1], edges[j] : edges[j + 1]]
                assert pooled[i, j].item() == pytest.approx(cell.mean().item(), rel=1e-4, abs=1e-6)


def test_what_tells_the_methods_apart() -> None:
    tokens = torch.randint(TINY["vocab_size"], (1, 40))
    by_method = {case.method: attention_statistics(woken_model(case, "gqa"), tokens) for case in DEFAULTS}
    leaking = attention_statistics(woken_model(LITERAL, "gqa"), tokens)["layers"][0]
    json.dumps([by_method, leaking], allow_nan=False)
    for method, statistics in by_method.items():
        for layer in statistics["layers"]:
            assert (layer["lambda"] is None) == (method in ("none", "lmam")), method
            assert (layer["o2_o1_ratio"] is None) == (method == "none"), method
            assert max(layer["first_map"]["negative_share"]) == 0
            same = method in ("none", "dex", "diffv")
            assert (layer["effective"] == layer["first_map"]) == same, method
            assert max(layer["effective"]["future_mass"]) < 1e-6, method
    assert max(by_method["diff"]["layers"][0]["effective"]["negative_share"]) > 0.05
    assert min(leaking["effective"]["future_mass"]) > 0.01 and max(leaking["first_map"]["future_mass"]) < 1e-6


def test_lambda_and_ratio_are_the_methods_own() -> None:
    model = woken_model(next(c for c in DEFAULTS if c.method == "dint"), "gqa")
    tokens = torch.randint(TINY["vocab_size"], (1, 40))
    model.enable_diagnostics()
    with torch.no_grad():
        model(tokens)
    want = model.diagnostics()
    for i, layer in enumerate(attention_statistics(model, tokens)["layers"]):
        assert layer["lambda"]["per_head"] == model.methods()[i].lam.value.tolist()
        for name in ("mean", "min", "max"):
            assert layer["lambda"][name] == pytest.approx(want[f"lambda_{name}/layers.{i}"].item(), rel=1e-6)
        assert layer["o2_o1_ratio"] == pytest.approx(want[f"o2_o1_ratio/layers.{i}"].item(), rel=1e-6)


def test_a_row_without_weights_has_no_entropy() -> None:
    """With λ = 1 the maps of ``diff`` cancel where there is one key only."""
    model = tiny_model("diff", lam="fixed", lam_init=1.0)
    (layer, *_) = attention_statistics(model, torch.zeros(1, 1, dtype=torch.int64))["layers"]
    assert layer["effective"]["entropy"] == [0.0] * TINY["num_heads"]


def test_the_model_is_as_before() -> None:
    model = tiny_model("dint").train()
    tokens = torch.randint(TINY["vocab_size"], (1, 20))
    before = model(tokens)
    attention_statistics(model, tokens)
    assert model.training and not model.diagnostics()
    assert not any(model.attention(i)._forward_hooks for i in range(len(model.layers)))
    assert torch.equal(model(tokens), before)
    with pytest.raises(ValueError, match="top_k=0"):
        attention_statistics(model, tokens, top_k=0)


class LiveBytes(TorchDispatchMode):
    """The most that the tensors made inside hold at one time, and the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        at, size = storage.data_ptr(), storage.nbytes()
        if at in self.known or not size:
            return
        self.known.add(at)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)

        def freed() -> None:
            self.known.discard(at)
            self.live -= size

        weakref.finalize(storage, freed)


@pytest.mark.parametrize(
    "options", [{}, {"integral": "sequence", "allow_future_leak": True}], ids=["causal", "literal"]
)
def test_memory_grows_with_the_length_and_not_its_square(options: dict[str, Any]) -> None:
    attention = tiny_model("dint", max_seq_len=2048, **options).layers[0].attn
    found = []
    for n in (1024, 2048):
        x, layout = torch.randn(1, n, TINY["embed_dim"]), Layout(None, None, num_queries=n)
        with torch.no_grad(), LiveBytes() as watch:
            layer_statistics(attention, x, layout, 8, [0])
        found.append(watch)
    rows = 64 * 2048 * TINY["num_heads"] * 4
    assert rows <= found[1].largest <= 2 * rows  # top-k has 64-bit indices, but only k of them
    assert found[1].peak < 2.1 * found[0].peak < 40 * rows, [watch.peak for watch in found]
