"""Compiled blocks: one graph without a break for every method, the same results, and few variants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lrdint_tune.attention import DocumentMask
from lrdint_tune.errors import ConfigError
from lrdint_tune.models import LlamaDecoder
from lrdint_tune.training import compilation
from lrdint_tune.training.activations import checkpoint_activations
from lrdint_tune.training.compilation import check_compiler, compile_blocks, uncompiled
from tests.common.adapters import ALL, wake_adapters
from tests.common.cases import CASES, MethodCase
from tests.common.compiling import Graphs, without_inductor
from tests.common.layouts import DOCUMENTS, layout_case
from tests.common.models import TINY, set_backend, tiny_model, wake, woken_model

OPERATIONS = [  # differ in what is done with the maps
    *("none", "diff-learned", "daa-annealed", "dex-top_entropy", "diffq-annealed", "diffk-annealed", "diffv-annealed"),
    *("difflora-fixed", "lmam", "lmam-inside_softmax-end", "lmam-softmax_map", "lmam-full_rank-end-heads"),
    *("dint-learned", "dint-sequence"),
]
LAMBDAS = [f"dint-{lam}" for lam in ("annealed", "exponential", "sigmoid", "fixed")]
BY_NAME = {case.name: case for case in CASES}
DINT = BY_NAME["dint-learned"]
PACKINGS = [
    *([[5, 1, 6], [3, 9]], [[2, 4, 6], [12]], [[1] * 12, [11, 1]], [[6, 6], [6, 6]]),
    *([[7, 5], [1, 1, 10]], [[4, 4, 4], [8, 4]], [[2, 2, 8], [3, 3, 3, 3]], [[9, 3], [1, 11]]),
]
OTHERS = ("causal", "packed_dense", "right_padded")


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    with without_inductor() as graphs:
        yield graphs


def batch(layout: str = "packed", seed: int = 1) -> dict[str, Any]:
    """Arguments of a model's forward."""
    case = layout_case(layout)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(TINY["vocab_size"], tuple(case.rows.positions.shape), generator=generator)
    return {"tokens": tokens, "mask": case.mask, "input_pos": case.input_pos, "labels": tokens.roll(-1, 1)}


def packed(lengths: list[list[int]]) -> dict[str, Any]:
    mask = DocumentMask(lengths)
    return {**batch(), "mask": mask, "input_pos": mask.input_pos()}


def twins(case: MethodCase, **sizes: Any) -> tuple[LlamaDecoder, LlamaDecoder]:
    """The same model twice."""
    model, other = woken_model(case, "gqa", **sizes), woken_model(case, "gqa", **sizes)
    other.load_state_dict(model.state_dict())
    return model, other


def step(model: LlamaDecoder, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(7)  # dropout's
    loss = model(**inputs)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]], what: str) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=0, msg=lambda m: f"{what}: {m}")
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        error = (got[1][name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-6)
        assert error < 1e-4, f"{what}, gradient of {name}: relative error {error:.1e}"


@pytest.mark.parametrize(
    ("case", "layouts"),
    [
        *(pytest.param(BY_NAME[name], ("packed",), id=name) for name in OPERATIONS + LAMBDAS),
        *(
            pytest.param(BY_NAME[name], OTHERS, id=f"{name}, other layouts", marks=pytest.mark.slow)
            for name in OPERATIONS
        ),
    ],
)
def test_equals_eager_in_one_graph(case: MethodCase, layouts: tuple[str, ...], graphs: Graphs) -> None:
    """Loss and every gradient; one graph a layout for both layers, or two where a constant is a layer's own."""
    eager, model = twins(case)
    names = list(model.state_dict())
    compile_blocks(model)
    assert list(model.state_dict()) == names
    per_layout = 2 if case.lam == "exponential" else 1
    for i, layout in enumerate(layouts, start=1):
        inputs = batch(layout)
        assert_same(step(model, inputs), step(eager, inputs), layout)
        assert 1 <= graphs.count <= i * per_layout, layout
    assert graphs.breaks == {}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, None) for name in ("none", "dint-learned", "lmam", "lmam-end", "lmam-inside_softmax")),
        *((name, "selective") for name in ("dint-learned", "lmam")),
    ],
)
def test_other_packings_are_not_compiled_again(name: str, mode: str | None, graphs: Graphs) -> None:
    eager, model = twins(BY_NAME[name], num_layers=3)
    if mode:
        checkpoint_activations(model, mode)
    compile_blocks(model)
    for lengths in PACKINGS:
        inputs = packed(lengths)
        assert_same(step(model, inputs), step(eager, inputs), str(lengths))
    assert graphs.count == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dint-learned", "lmam"])
def test_other_dense_masks_and_lengths_are_compiled_once_more(name: str, graphs: Graphs) -> None:
    """Documents in dense masks; then rows of other lengths, which become a variable at the second."""
    eager, model = twins(BY_NAME[name])
    compile_blocks(model)
    for lengths in PACKINGS:
        inputs = packed(lengths)
        inputs["mask"] = inputs["mask"].to_dense()
        assert_same(step(model, inputs), step(eager, inputs), str(lengths))
    assert graphs.count == 1
    lengths = []
    for n in (12, 11, 10, 9, 8):
        rows = {"tokens": inputs["tokens"][:, :n], "labels": inputs["labels"][:, :n]}
        assert_same(step(model, rows), step(eager, rows), f"N = {n}")
        lengths.append(graphs.count)
    assert lengths[-1] <= 4 and lengths[-1] == lengths[-3], lengths


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode"),
    [("dint-annealed", None), ("diffv-sigmoid", None), ("dint-annealed", "full"), ("lmam", "selective")],
)
def test_diagnostics(name: str, mode: str | None, graphs: Graphs) -> None:
    """The scalars of eager; switched on and off, they cost one more variant."""
    eager, model = twins(BY_NAME[name])
    if mode:
        checkpoint_activations(model, mode)
    compile_blocks(model)
    for i, enabled in enumerate((False, True, False, True)):
        for m in (eager, model):
            m.enable_diagnostics(enabled)
        for part in (0, 1):  # two passes of one step
            inputs = batch(seed=2 * i + part)
            assert_same(step(model, inputs), step(eager, inputs), f"enabled: {enabled}")
        got, want = model.diagnostics(), eager.diagnostics()
        assert bool(want) == enabled and got.keys() == want.keys()
        for tag, value in want.items():
            assert value != 0 or tag.startswith("lambda")
            torch.testing.assert_close(got[tag], value, rtol=1e-5, atol=1e-7, msg=tag)
    assert graphs.count == 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "full", "every_k", "selective"])
def test_what_is_kept(mode: str | None, graphs: Graphs) -> None:
    """The compiled backward pass computes products again where they were not kept."""
    eager, model = twins(DINT)
    if mode:
        checkpoint_activations(model, mode, 2 if mode == "every_k" else None)
    compile_blocks(model)
    inputs = batch()
    assert_same(step(model, inputs), step(eager, inputs), str(mode))

    with without_inductor() as plain:
        compile_blocks(other := twins(DINT)[0])
        step(other, inputs)
    (without,) = plain.products_in_backward
    products = graphs.products_in_backward
    if mode in (None, "selective"):
        assert products == [without]
    elif mode == "full":
        assert products[0] > without and len(products) == 1
    else:  # the backward passes run from the last block to the first
        assert products[0] > without == products[1]


def dropping(mode: str | None = None) -> LlamaDecoder:
    """Every adapter, with dropout where there is any."""
    torch.manual_seed(3)
    adapters = [{**ALL[0], "lora_dropout": 0.3}, ALL[1], {**ALL[2], "dropout": 0.3}]
    model = wake(tiny_model("dint", rank=3, adapters=adapters))
    wake_adapters(model)
    if mode:
        checkpoint_activations(model, mode, 2 if mode == "every_k" else None)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "full", "every_k", "selective"])
def test_adapters_with_dropout(mode: str | None, graphs: Graphs) -> None:
    """What is computed again draws the same numbers."""
    model, inputs = dropping(mode), batch()
    compile_blocks(model)
    assert_same(step(model, inputs), step(dropping(), inputs), str(mode))
    assert graphs.breaks == {}


@torch.no_grad()
@pytest.mark.parametrize("layout", ["causal", "packed", "packed_dense", "packed_block"])
def test_flex(layout: str, graphs: Graphs) -> None:
    """The mask goes into the graph as FlexAttention wants it; other block masks are not compiled again."""
    eager, model = twins(BY_NAME["dint-learned"])
    set_backend(model, "auto" if layout == "packed_block" else "flex")
    compile_blocks(model)
    inputs = batch(layout)
    del inputs["labels"]
    dense = {**inputs, "mask": layout_case("packed").rows.allowed if "packed" in layout else None}
    for _ in range(2):
        torch.testing.assert_close(model(**inputs), eager(**dense), rtol=1e-4, atol=1e-5)
    assert graphs.count == 1 and graphs.breaks == {}


def test_calibration_runs_uncompiled(graphs: Graphs) -> None:
    case = BY_NAME["dex-top_entropy"]
    eager, model = twins(case)
    checkpoint_activations(model, "full")
    compile_blocks(model)
    inputs = batch()
    del inputs["labels"]
    with uncompiled(model):
        model.calibrate([inputs])
    eager.calibrate([inputs])
    assert graphs.count == 0
    assert [m.get_buffer("selected").tolist() for m in model.methods()] == [
        m.get_buffer("selected").tolist() for m in eager.methods()
    ]
    assert_same(step(model, batch()), step(eager, batch()), "after calibration")
    assert graphs.count == 1


def test_no_compiler_is_refused() -> None:
    missing = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with missing, pytest.raises(ConfigError, match=r"compile=true: .* C\+\+ compiler"):
        check_compiler("cpu")


def test_no_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "has_triton", lambda: False)
    with pytest.raises(ConfigError, match="compile=true: .* triton"):
        check_compiler("cuda")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode"),
    [("dint-sigmoid", None), ("dint-learned", "selective"), ("lmam", "full")],
)
def test_inductor(name: str, mode: str | None) -> None:
    eager, model = twins(BY_NAME[name])
    if mode:
        checkpoint_activations(model, mode)
    compile_blocks(model)
    torch._dynamo.reset()
    for lengths in (DOCUMENTS, PACKINGS[1]):
        inputs = packed(lengths)
        assert_same(step(model, inputs), step(eager, inputs), str(lengths))
