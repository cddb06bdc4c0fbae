"""Tensor, context, sharded and replicated data parallelism, and their products: the training of one process."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lrdint_tune.errors import ConfigError
from lrdint_tune.models import llama3_2
from lrdint_tune.training.components import build_model
from lrdint_tune.training.parallelize import check_parallel
from lrdint_tune.training.tensor_parallel import check_tensor_parallel
from tests.common.compiling import skip_inductor
from tests.common.tiny_run import SIZES, write_model, write_run
from tests.distributed.harness import run_ranks
from tests.distributed.steps import (
    Step,
    assert_same_step,
    losses,
    plain_step,
    read_config,
    selected_heads,
    traffic,
    trainer_step,
)

MODEL = {"_component_": "lrdint_tune.models.llama3_2", **SIZES}
HALF_WAY = {"lam": "annealed", "anneal_steps": 8}
LORA = [{"type": "lora", "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], "rank": 3}]
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "dint": {"rank": 3, "lam_init": 0.3},
    "daa": HALF_WAY,
    "dex": HALF_WAY,
    "lmam": {"n": 300, "scale": 1.0},
}
OTHERS: dict[str, dict[str, Any]] = {
    "diff, exponential": {"method": "diff", "rank": 3, "factors": "shared", "noise_heads": "kv", "lam": "exponential"},
    "dint, sigmoid": {"method": "dint", "rank": 3, "lam": "sigmoid", "secondary_keys": "shared"},
    "dint, full rank": {"method": "dint", "rank": None, "lam_init": 0.3, "lam_sharing": "layer"},
    "daa, after RoPE": {"method": "daa", "position": "after", "lam_sharing": "layer", **HALF_WAY},
    "dex, one matrix": {"method": "dex", "sharing": "layer", "lam": "exponential", "lam_sharing": "head"},
    "diffq": {"method": "diffq", **HALF_WAY},
    "diffk": {"method": "diffk", **HALF_WAY},
    "diffv": {"method": "diffv", "lam": "sigmoid"},
    "difflora": {"method": "difflora", "rank": 3, "sublayer_norm": True},
    "lmam, two maps": {"method": "lmam", "n": 300, "scale": 1.0, "heads": 2, "softmax_map": True},
    "lmam, full rank": {
        "method": "lmam",
        "n": 300,
        "scale": 1.0,
        "heads": 1,
        "full_rank": True,
        "inside_softmax": True,
    },
    "none": {"method": "none"},
    "lora": {"method": "dint", "rank": 3, "lam_init": 0.3, "adapters": LORA},
}
CLIPPED = {"clip_grad_norm": 0.5}
TENSOR = {"data_parallel_shard_dim": 1, "tensor_parallel_dim": 2}
CONTEXT = {"data_parallel_shard_dim": 1, "context_parallel_dim": 2}
MESHES: dict[str, tuple[int, dict[str, int]]] = {
    "shard 2": (2, {"data_parallel_shard_dim": 2}),
    "replicate 2 x shard 2": (4, {"data_parallel_replicate_dim": 2}),
    "shard 2 x tensor 2": (4, {"tensor_parallel_dim": 2}),
    "shard 2 x context 2": (4, {"context_parallel_dim": 2}),
    "shard 4": (4, {"data_parallel_shard_dim": 4}),
}
# A zero at the start: LMAM's first factor, LoRA's first.
ASLEEP = ("method.a", ".a.weight", "1.down.weight")


def compiled_step(file: Path, changes: dict[str, Any], at: int) -> Step:
    skip_inductor()
    return trainer_step(file, {**changes, "compile": True}, at)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(
        tmp_path_factory.mktemp("meshes"), lr_scheduler=None, clip_grad_norm=None, optimizer__lr=3e-3, lam_lr=None
    )


@cache
def _one_process(run: Path, method: str) -> list[float]:
    return run_ranks(losses, 1, run, {**_model(method), **CLIPPED})[0]


def _model(method: str) -> dict[str, Any]:
    return {"model": {**MODEL, "method": method, **METHODS[method]}}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("method", METHODS)
def test_ten_steps(run: Path, method: str, mesh: str) -> None:
    size, dims = MESHES[mesh]
    expected = _one_process(run, method)
    assert expected[0] - expected[-1] > 0.05, "nothing was learned, so there is nothing to compare"
    for found in run_ranks(losses, size, run, {**_model(method), **dims, **CLIPPED}, timeout=200):
        assert len(found) == 10
        assert found == pytest.approx(expected, rel=0, abs=1e-4)


@pytest.mark.parametrize("dims", [TENSOR, CONTEXT], ids=["tensor", "context"])
@pytest.mark.parametrize("options", OTHERS.values(), ids=list(OTHERS))
def test_gradients(run: Path, options: dict[str, Any], dims: dict[str, int]) -> None:
    """Of every new tensor and of the attention's own, with λ away from 0."""
    changes = {"model": {**MODEL, **options}, "trainable": ["adapter", "attention"]}
    expected = _plain(run, json.dumps(changes))
    for step in run_ranks(trainer_step, 2, run, {**changes, **dims}, 2):
        assert_same_step(step, expected, asleep=ASLEEP)


@cache
def _plain(run: Path, changes: str) -> Any:
    return run_ranks(plain_step, 1, run, json.loads(changes), 2)[0]


@pytest.mark.parametrize("dims", [TENSOR, CONTEXT], ids=["tensor", "context"])
@pytest.mark.parametrize("untied", [False, True])
def test_everything_trained(run: Path, dims: dict[str, int], untied: bool) -> None:
    """Norms, MLP, and the embeddings that are the output head too, or are not; passes of a step add up."""
    changes = {**_model("dint"), "trainable": ["all"], "untie_lm_head": untied}
    expected = run_ranks(trainer_step, 1, run, changes)[0]
    for step in run_ranks(trainer_step, 2, run, {**changes, **dims, "batch_size": 2}):
        assert_same_step(step, expected)


@pytest.mark.parametrize("dims", [TENSOR, CONTEXT], ids=["tensor", "context"])
@pytest.mark.parametrize("method", ["dint", "lmam"])
def test_rows_with_padding(run: Path, method: str, dims: dict[str, int]) -> None:
    """Unpacked rows of unequal length, whose last tokens lie on one rank only."""
    changes = {**_model(method), "dataset.packed": False, "batch_size": 4}
    expected = run_ranks(trainer_step, 1, run, changes, 2)[0]
    for step in run_ranks(trainer_step, 2, run, {**changes, **dims}, 2):
        assert_same_step(step, expected, asleep=ASLEEP)


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("dims", [TENSOR, CONTEXT], ids=["tensor", "context"])
def test_activation_checkpointing(run: Path, dims: dict[str, int], mode: str) -> None:
    """Collectives of the recomputation included: the same bits."""
    changes = {**_model("dint"), "dtype": "bf16", **dims}
    expected = run_ranks(trainer_step, 2, run, changes)[0]
    again = {**changes, "enable_activation_checkpointing": True, "ac_mode": mode}
    for step in run_ranks(trainer_step, 2, run, again):
        assert_same_step(step, expected, loss=0, gradients=0)


def test_calibration_of_a_shared_sequence(run: Path) -> None:
    changes = {"model": {**MODEL, "method": "dex", "heads": "top_entropy", "top_k": 1}, "dataset.packed": False}
    changes |= {"batch_size": 4, "calibration_batches": 2}
    expected = run_ranks(selected_heads, 1, run, changes)[0]
    assert run_ranks(selected_heads, 2, run, {**changes, **CONTEXT}) == [expected] * 2


def test_what_tensor_parallelism_sends(run: Path) -> None:
    """Two all-reduces of the hidden states forward and two backward a layer: the embeddings are frozen, so the first
    layer's input needs no gradient, but the loss's does."""
    changes = {**_model("dint"), **TENSOR, "batch_size": 4}
    hidden = 4 * 512 * SIZES["embed_dim"]
    for sent, _ in run_ranks(traffic, 2, run, changes):
        assert sent["all_reduce"].count(hidden) == 4 * SIZES["num_layers"]
        assert max(sent["all_reduce"]) == hidden


def test_the_gradient_of_a_trained_head_is_added_up_once(run: Path) -> None:
    """And so are those of what all heads share, whatever the number of passes."""
    changes = {**_model("dint"), **TENSOR, "trainable": ["lm_head", "embeddings"], "untie_lm_head": True}
    head = SIZES["vocab_size"] * SIZES["embed_dim"]
    for sent, _ in run_ranks(traffic, 2, run, {**changes, "batch_size": 2}):
        assert sent["all_reduce"].count(head) == 1


def test_what_context_parallelism_sends(run: Path) -> None:
    """Keys, values and the method's own keys are gathered in each layer, and no hidden states."""
    changes = {**_model("dint"), **CONTEXT, "batch_size": 4}
    stream = 4 * 256 * SIZES["num_kv_heads"] * SIZES["embed_dim"] // SIZES["num_heads"]
    for sent, _ in run_ranks(traffic, 2, run, changes):
        assert sent["all_gather"].count(stream) == 3 * SIZES["num_layers"]
        # Gradients of the gathered, whole, and those of the parameters.
        assert sent["reduce_scatter"].count(2 * stream) == 3 * SIZES["num_layers"]
        assert max(sent["all_reduce"]) < stream


@pytest.mark.parametrize("dims", [TENSOR, CONTEXT], ids=["tensor", "context"])
def test_fp8(tmp_path: Path, dims: dict[str, int]) -> None:
    """Scales are those of the parts, so the rounding differs; the loss hardly does."""
    write_model(tmp_path / "model", embed_dim=64)
    run = write_run(tmp_path, model__embed_dim=64)
    changes = {"fp8": "tensorwise", "dtype": "bf16", "model.lam_init": 0.3}
    ((expected,),) = run_ranks(losses, 1, run, changes, 1)
    for (found,) in run_ranks(losses, 2, run, {**changes, **dims}, 1):
        assert found == pytest.approx(expected, rel=5e-3)


def test_fp8_parts_that_are_too_small_are_refused(run: Path) -> None:
    cfg = read_config(run, {**_model("dint"), **TENSOR, "fp8": "tensorwise"})
    with pytest.raises(ConfigError, match=r"tensor_parallel_dim=2: leaves parts of layers.0.attn.k_proj \[16, 32\]"):
        check_parallel(build_model(cfg), cfg, torch.device("cpu"), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "dims"),
    [
        pytest.param({"method": "dint", **METHODS["dint"], "adapters": LORA}, TENSOR, id="tensor"),
        pytest.param({"method": "dint", **METHODS["dint"]}, CONTEXT, id="context"),
    ],
)
def test_compiled(run: Path, options: dict[str, Any], dims: dict[str, int]) -> None:
    """The collectives are in the blocks' graphs."""
    changes = {"model": {**MODEL, **options}}
    expected = run_ranks(trainer_step, 1, run, changes, 2)[0]
    for step in run_ranks(compiled_step, 2, run, {**changes, **dims}, 2, timeout=200):
        assert_same_step(step, expected, asleep=ASLEEP)


@pytest.mark.parametrize("dims", [TENSOR, CONTEXT], ids=["tensor", "context"])
def test_optimizer_in_backward(run: Path, dims: dict[str, int]) -> None:
    changes = {**_model("dint"), "batch_size": 4, **dims}
    expected = run_ranks(losses, 2, run, changes, 3)
    found = run_ranks(losses, 2, run, {**changes, "optimizer_in_bwd": True}, 3)
    assert found == expected


REFUSED = {
    "heads": (3, {"method": "dint"}, "tensor_parallel_dim=3: does not divide the model's num_heads of 4"),
    "key heads": (4, {"method": "dint"}, "tensor_parallel_dim=4: does not divide the model's num_kv_heads of 2"),
    "top_entropy": (2, {"method": "dex", "heads": "top_entropy"}, "method 'dex', heads='top_entropy'"),
    "maps": (
        4,
        {"method": "lmam", "heads": 6, "num_heads": 12, "num_kv_heads": 4, "head_dim": 8},
        "heads=6: query head j uses map j mod 6",
    ),
    "bottleneck": (2, {"adapters": [{"type": "bottleneck"}]}, "layers.0.mlp.adapters.bottleneck cannot be split"),
}


@pytest.mark.parametrize(("size", "options", "message"), REFUSED.values(), ids=list(REFUSED))
def test_refused_tensor_parallelism(size: int, options: dict[str, Any], message: str) -> None:
    with torch.device("meta"):
        model = llama3_2(**{**SIZES, **options})
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_tensor_parallel(model, size)
    check_tensor_parallel(model, 1)


def test_a_method_that_does_not_name_its_heads_is_refused() -> None:
    with torch.device("meta"):
        model = llama3_2(**SIZES, method="daa")
    for method in model.methods():
        method.head_dims = {}
    with pytest.raises(ConfigError, match="method 'daa' does not say which dimension of w_daa counts heads"):
        check_tensor_parallel(model, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dint", "integral": "sequence", "allow_future_leak": True}, "integral='sequence': is not there"),
        ({"method": "lmam", "alignment": "end"}, "alignment='end': with context_parallel_dim > 1"),
    ],
    ids=["literal dint", "lmam from the end"],
)
def test_refused_context_parallelism(run: Path, options: dict[str, Any], message: str) -> None:
    cfg = read_config(run, {"model": {**MODEL, **options}, **CONTEXT})
    model = build_model(cfg)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_parallel(model, cfg, torch.device("cpu"), 1)


def test_a_sequence_that_does_not_divide(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"context_parallel_dim=3: does not divide max_seq_len=512 \(512 / 3"):
        read_config(run, {"context_parallel_dim": 3})
