"""What the parts of a step hold follows from the knobs as it must."""

from typing import Any

import pytest
import torch

from lrdint_tune.errors import ConfigError
from lrdint_tune.planning.optimizer import measure_optimizer
from lrdint_tune.planning.parts import Part, Parts, measure_parts
from lrdint_tune.planning.skeleton import local_model
from lrdint_tune.training.config import TrainConfig
from tests.common.cases import CASES, MethodCase
from tests.common.plans import knobs, planned_config

B, N, D = 1, 512, 128


def measure(cfg: TrainConfig, device: str = "cuda", **changes: Any) -> Parts:
    return measure_parts(cfg, local_model(cfg, 1).spec, knobs(**changes), device)


def block(cfg: TrainConfig, device: str = "cuda", **changes: Any) -> Part:
    return next(iter(measure(cfg, device, **changes).middle.values()))


def test_full_checkpointing_keeps_the_input_only() -> None:
    cfg = planned_config()
    part = block(cfg, checkpointing="full")
    assert part.inputs == B * N * D * 4
    assert part.inputs <= part.kept < 1.01 * part.inputs
    assert part.backward > block(cfg, checkpointing="none").kept  # recomputed, then held as without


def test_kept_is_ordered() -> None:
    kept = [block(planned_config(), checkpointing=mode).kept for mode in ("full", "selective", "none")]
    assert kept == sorted(kept) and len(set(kept)) == 3


def test_both_kinds_of_blocks_are_measured_for_every_k() -> None:
    assert set(measure(planned_config(), checkpointing="every_k", every=2).middle) == {True, False}


def test_grows_with_the_batch_and_not_with_its_square() -> None:
    one, two = (block(planned_config(), batch_size=b) for b in (1, 2))
    assert two.kept == pytest.approx(2 * one.kept, rel=0.01)
    long = block(planned_config(max_seq_len=256))
    assert one.kept == pytest.approx(2 * long.kept, rel=0.01)


def test_eager_attention_keeps_its_maps() -> None:
    sdpa, eager = (
        block(planned_config("none", {"attention_backend": backend}, trainable=["attention"]))
        for backend in ("sdpa", "eager")
    )
    assert eager.kept - sdpa.kept > 0.9 * 4 * N * N * 4


def test_bf16_holds_less() -> None:
    fp32, bf16 = (block(planned_config(dtype=dtype)) for dtype in ("fp32", "bf16"))
    assert 0.4 * fp32.kept < bf16.kept < 0.8 * fp32.kept  # rotations and norms stay in float32


def test_methods_hold_more_than_none() -> None:
    none = block(planned_config("none", trainable=["attention"]))
    for method in ("dint", "daa", "lmam"):
        assert block(planned_config(method)).kept > none.kept


def test_first_block_of_frozen_embeddings() -> None:
    """Nothing flows back to its input."""
    parts = measure(planned_config("none", trainable=["mlp"]))
    assert parts.first[False].kept < parts.middle[False].kept
    assert parts.embedding.kept == parts.embedding.backward == 0
    trained = measure(planned_config("none", trainable=["all"]))
    assert trained.first == trained.middle
    assert trained.embedding.left == 2048 * D * 4


def test_head_gradient_is_kept_from_the_loss() -> None:
    frozen, trained = (measure(planned_config("none", trainable=[group])).loss for group in ("attention", "all"))
    assert trained.kept - frozen.kept >= 2048 * D * 4
    assert frozen.forward > N * 2048 * 4  # the logits of this short sequence are one chunk


def test_tensor_parallel_splits_the_inner_activations() -> None:
    whole, half = (block(planned_config(), tensor=n) for n in (1, 2))
    assert half.inputs == whole.inputs
    assert 0.5 * whole.kept < half.kept < 0.8 * whole.kept


def test_context_parallel_gathers_keys() -> None:
    """Half of the rows, but whole keys, values and (``dint``) second keys."""
    cfg = planned_config()
    half, shard = block(planned_config(max_seq_len=256)), block(cfg, context=2)
    others = 3 * (N // 2) * 2 * 32 * 4
    assert shard.inputs == half.inputs
    assert shard.kept == half.kept + others
    assert block(cfg, context=2, checkpointing="full").kept < half.kept


@pytest.mark.parametrize(
    ("section", "of_8192"),
    [
        ({"_component_": "torch.optim.AdamW"}, 8 * 8192 + 4),
        ({"_component_": "torch.optim.AdamW", "fused": True}, 8 * 8192 + 4),
        ({"_component_": "torch.optim.SGD"}, 0),
        ({"_component_": "torch.optim.SGD", "momentum": 0.9}, 4 * 8192),
        # Two moments: a byte each, a scale for 256 and a table of 256.
        ({"_component_": "torchao.optim.AdamW8bit"}, 2 * (8192 + 4 * 32 + 4 * 256) + 4),
    ],
    ids=str,
)
def test_optimizer_state(section: dict[str, Any], of_8192: int) -> None:
    parameters = [torch.empty(128, 64, device="meta") for _ in range(3)]
    state, _ = measure_optimizer({**section, "lr": 1e-3}, [{"params": parameters}], "cpu")
    assert state == 3 * of_8192


def test_optimizer_scratch() -> None:
    """A loop holds temporaries of one parameter, ``foreach`` (a GPU's default) of all, a fused step none."""
    parameters = [torch.empty(128, 64, device="meta") for _ in range(8)]
    section, one = {"_component_": "torch.optim.AdamW", "lr": 1e-3}, 128 * 64 * 4
    _, loop = measure_optimizer(section, [{"params": parameters}], "cpu")
    _, together = measure_optimizer(section, [{"params": parameters}], "cuda")
    _, fused = measure_optimizer({**section, "fused": True}, [{"params": parameters}], "cuda")
    assert one <= loop <= 3 * one
    assert together >= 8 * one
    assert fused == 0


def test_optimizer_that_needs_values_is_refused() -> None:
    section = {"_component_": "torch.optim.Adafactor", "lr": 1e-3}
    with pytest.raises(ConfigError, match="Adafactor.*cannot be planned"):
        measure_optimizer(section, [{"params": [torch.empty(8, 8, device="meta")]}], "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if "lam" not in case.options], ids=str)
def test_every_variant(case: MethodCase) -> None:
    """Each method with each of its options (λ's forms hold next to nothing) can be run without values, or is refused by
    name."""
    options = {name: value for name, value in case.options.items() if name != "method"}
    cfg = planned_config(case.options["method"], options, trainable=["adapter", "attention"], max_seq_len=64)
    for device in ("cpu", "cuda"):
        if options.get("alignment") == "end":
            with pytest.raises(ConfigError, match="model.method='lmam'.*alignment=start"):
                measure(cfg, device)
        else:
            assert block(cfg, device, checkpointing="selective").kept > 0
