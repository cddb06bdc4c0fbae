"""Every method as part of a model: saved and loaded, under Hugging Face's names and order, compiled, within memory."""

import io
from typing import Any

import pytest
import torch

from benchmarks.inputs import Case as Measured
from benchmarks.measure import peak_bytes
from lrdint_tune.attention import DocumentMask
from lrdint_tune.models.hf_names import to_hf, to_tune
from tests.common.cases import CASES, DEFAULTS, STEP, MethodCase
from tests.common.layouts import layout_case
from tests.common.models import TINY, raw_weights, tiny_model, wake, woken_model
from tests.common.reference import Sublayer, Weights, reference_attention


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_saved_and_loaded(case: MethodCase) -> None:
    """Everything that a forward depends on is in the state dict: parameters, the schedule's step, selected heads."""
    model = woken_model(case, "gqa")
    tokens = torch.randint(TINY["vocab_size"], (2, 9))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = tiny_model(**case.options)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(tokens), model(tokens))


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_hugging_face_order(case: MethodCase) -> None:
    """The formulas give the same result from the renamed and reordered tensors under Hugging Face's order of pairs."""
    model, layout = woken_model(case, "gqa").double(), layout_case("packed")
    moved = {}
    for name, tensor in model.state_dict().items():
        hf_name, hf_tensor = to_hf(name, tensor, model.spec)
        back, original = to_tune(hf_name, hf_tensor, model.spec)
        assert back == name and torch.equal(original, tensor)
        assert (".attn.method." in name) == (".self_attn.method." in hf_name)
        moved[hf_name] = hf_tensor

    def weights(state: Weights, prefix: str, output: str) -> Weights:
        base = {"q_proj.weight": "wq", "k_proj.weight": "wk", "v_proj.weight": "wv", f"{output}.weight": "wo"}
        own = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        return {base.get(name) or name.removeprefix("method."): t for name, t in own.items()}

    x = torch.randn(*layout.rows.documents.shape, TINY["embed_dim"], dtype=torch.float64)
    sizes = {"num_heads": 4, "num_kv_heads": 2, "layer": 1, "step": STEP}
    ours = weights(model.state_dict(), "layers.1.attn.", "output_proj")
    theirs = weights(moved, "model.layers.1.self_attn.", "o_proj")
    want = reference_attention(x, ours, layout.rows, case.options, **sizes)
    got = reference_attention(x, theirs, layout.rows, case.options, **sizes, halves=True)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_compiled_equals_eager(case: MethodCase, backend: str) -> None:
    """One attention module: output, gradient of the input and of every parameter."""
    attention = woken_model(case, "gqa", num_layers=1).layers[0].attn
    x = torch.randn(2, 12, TINY["embed_dim"], requires_grad=True)
    downstream = torch.randn(2, 12, TINY["embed_dim"])
    leaves = [x, *attention.parameters()]
    torch._dynamo.reset()
    want, got = (
        (out := run(x), *torch.autograd.grad(out, leaves, downstream))
        for run in (attention, torch.compile(attention, backend=backend))
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Packed(Measured):
    """The attention module on a pack of documents."""

    def __init__(self, model: Any, lengths: list[int]) -> None:
        super().__init__(model, "attention", sum(lengths))
        self.mask = DocumentMask([lengths])

    def forward_backward(self) -> None:
        self.module(self.x, mask=self.mask).backward(self.gradient)


LONG = 8192


@pytest.mark.slow
@pytest.mark.parametrize(
    "lengths",
    [[LONG], [5000, 3, 3189], [64] * 128, [128] + [2] * 4032],
    ids=["whole", "packed", "short", "one long and many short"],
)
@pytest.mark.parametrize(
    "options", [{}, {"alignment": "end"}, {"n": 256, "heads": 1}, {"softmax_map": True}, {"full_rank": True}], ids=str
)
def test_lmam_holds_no_map_of_all_rows(options: dict[str, Any], lengths: list[int]) -> None:
    """Forward and backward at N = 8192 hold less than a quarter of one boolean N x N map."""
    sizes = {"num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "max_seq_len": LONG}
    model = tiny_model(method="lmam", attention_backend="sdpa", **sizes, **options)
    assert peak_bytes(Packed(model, lengths)) < LONG**2 // 4


def test_a_map_of_all_rows_would_be_seen() -> None:
    sizes = {"num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "max_seq_len": 1024}
    for options in ({"attention_backend": "eager"}, {"inside_softmax": True}):
        assert peak_bytes(Packed(tiny_model(method="lmam", **sizes, **options), [1024])) > 1024**2


def test_the_heads_of_highest_entropy_are_selected() -> None:
    """dex: the half of each layer's heads whose rows of A1 have the highest mean entropy on the calibration batches."""
    model = wake(tiny_model(method="dex", heads="top_entropy"))
    assert all(method.selected.tolist() == [1, 1, 1, 1] for method in model.methods())
    batches, inputs = [], {}
    for name in ("packed", "left_padded"):
        layout = layout_case(name)
        tokens = torch.randint(TINY["vocab_size"], layout.rows.positions.shape)
        batches.append({"tokens": tokens, "mask": layout.mask, "input_pos": layout.input_pos})
    for i, layer in enumerate(model.layers):
        layer.attn.register_forward_pre_hook(lambda _, args, i=i: inputs.setdefault(i, []).append(args[0].double()))
    model.calibrate(batches)
    for i, layer in enumerate(model.layers):
        weights, _ = raw_weights(layer.attn)
        total = torch.zeros(4, dtype=torch.float64)
        for x, name in zip(inputs[i], ("packed", "left_padded"), strict=True):
            rows = layout_case(name).rows
            maps = torch.stack(Sublayer(x, weights, rows, {"method": "none"}, 4, 2).primary_maps(), dim=1)
            entropy = -torch.where(maps > 0, maps * maps.clamp(min=1e-300).log(), 0.0).sum(-1)  # [B, H, N]
            total += torch.stack([entropy[:, h][rows.valid].mean() for h in range(4)]).detach()
        assert layer.attn.method.selected.nonzero().flatten().tolist() == sorted(total.topk(2).indices.tolist())
