"""Knobs, shards, collectives, time and advice."""

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from lrdint_tune.errors import ConfigError
from lrdint_tune.models import llama3_2
from lrdint_tune.planning import Planner, Target, plan
from lrdint_tune.planning.advice import advise, changes
from lrdint_tune.planning.communication import Traffic, step_traffic
from lrdint_tune.planning.knobs import Knobs
from lrdint_tune.planning.options import PlanOptions
from lrdint_tune.planning.skeleton import ROOT, build_skeleton, fake_world, local_model
from lrdint_tune.planning.timing import Flops, Network, Work, count_flops, estimate_time
from lrdint_tune.training.activations import checkpoint_activations
from lrdint_tune.training.config import load_config
from lrdint_tune.training.flops import training_flops_per_token
from lrdint_tune.training.hardware import HARDWARE
from tests.common.plans import SMALL, knobs, planned_config
from tests.common.tiny_run import SIZES

GIB = 2**30


# ------------------------------------------------------------------ knobs


def test_mesh_and_passes() -> None:
    cfg = planned_config(
        data_parallel_replicate_dim=2, tensor_parallel_dim=2, context_parallel_dim=4, batch_size=2, global_batch_size=64
    )
    found = Knobs.from_config(cfg, 64)
    assert (found.replicate, found.shard, found.tensor, found.context) == (2, 4, 2, 4)
    assert found.fsdp == 16 and found.data_parallel == 8
    assert found.passes == 4  # 64 / (2 x 8): ranks that share a sequence do not add to the batch


def test_ranks_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"context_parallel_dim x tensor_parallel_dim=3 x 2.*8 / 6"):
        Knobs.from_config(planned_config(tensor_parallel_dim=2, context_parallel_dim=3, max_seq_len=510), 8)


def test_heads_that_tensor_parallel_does_not_divide() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_dim=4: does not divide the model's num_kv_heads of 2"):
        plan(planned_config(tensor_parallel_dim=4), cpu(4))


# ------------------------------------------------------------------ shards


FOUR = {"num_kv_heads": 4}  # nothing of four heads is padded on two or four ranks


def test_shards_add_up() -> None:
    """At rest: trained parameters in float32, frozen ones in bf16, over the shards; gathered: all in bf16."""
    cfg = planned_config(model=FOUR, dtype="bf16")
    with fake_world(4):
        skeleton = build_skeleton(cfg, knobs(shard=4))
    model = llama3_2(**{**SMALL, **FOUR}, method="dint")
    in_layer = {name: p.numel() for name, p in model.layers[1].named_parameters()}
    trained = sum(n for name, n in in_layer.items() if name.startswith("attn."))
    group = skeleton.groups["layers.1"]
    assert group.trained == trained
    assert group.gathered == 2 * sum(in_layer.values())
    assert group.gradients == 2 * trained
    assert group.sharded == (4 * trained + 2 * (sum(in_layer.values()) - trained)) // 4
    assert group.cast == 2 * trained // 4
    assert skeleton.groups[ROOT].trained == 0
    held = sum(p.numel() for g in skeleton.parameter_groups for p in g["params"])
    assert held == 4 * trained // 4
    assert skeleton.buffers == 4 * 512 * 32


def test_uneven_shards_are_padded() -> None:
    """Four heads over eight ranks: one each, of which four are padding, for λ and two factors ``[4, 8, 32]``."""
    with fake_world(8):
        eight = build_skeleton(planned_config(model=FOUR), knobs(shard=8)).groups["layers.0"]
    with fake_world(4):
        four = build_skeleton(planned_config(model=FOUR), knobs(shard=4)).groups["layers.0"]
    assert eight.trained - four.trained == 4 + 2 * 4 * 8 * 32


def test_tensor_parallel_halves_blocks_only() -> None:
    with fake_world(4):
        whole = build_skeleton(planned_config(model=FOUR), knobs(shard=2)).groups
        half = build_skeleton(planned_config(model=FOUR), knobs(shard=2, tensor=2)).groups
    norms = 2 * 128 * 4
    assert half["layers.0"].gathered - norms == (whole["layers.0"].gathered - norms) // 2
    assert half[ROOT] == whole[ROOT]


def test_nf4_weights() -> None:
    """0.5 bytes a weight, a scale of a byte for 64, four bytes a row."""
    cfg = planned_config(trainable=["adapter"], dtype="bf16")
    with fake_world(2):
        plain, nf4 = (build_skeleton(cfg, knobs(nf4=flag)).groups["layers.0"] for flag in (False, True))
    weights, rows = 3 * 128 * 384 + 2 * 128 * 128 + 2 * 128 * 64, 2 * 384 + 3 * 128 + 2 * 64
    assert plain.sharded - nf4.sharded == (2 * weights - weights // 2 - weights // 64 - 4 * rows) // 2
    assert nf4.trained == plain.trained


def test_fp8_all_gather() -> None:
    with fake_world(2):
        plain, fp8 = (build_skeleton(planned_config(dtype="bf16"), knobs(fp8_all_gather=f)) for f in (False, True))
    weights = 3 * 128 * 384 + 2 * 128 * 128 + 2 * 128 * 64
    assert plain.groups["layers.0"].sent - fp8.groups["layers.0"].sent == weights
    assert plain.groups[ROOT].sent == fp8.groups[ROOT].sent


def test_only_one_process_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without a launcher"):
        plan(planned_config(), cpu(2))


# ------------------------------------------------------------------ collectives


def cpu(world_size: int) -> Target:
    return PlanOptions(world_size=world_size, gpu="cpu").target


def traffic_of(cfg: Any, world_size: int) -> dict[tuple[str, str, str], Traffic]:
    return {(t.kind, t.dimension, t.phase): t for t in plan(cfg, cpu(world_size)).traffic}


def test_fsdp_collectives() -> None:
    cfg = planned_config(model=FOUR, dtype="bf16", gradient_accumulation_steps=3, data_parallel_replicate_dim=2)
    found = traffic_of(cfg, 8)
    model = llama3_2(**{**SMALL, **FOUR}, method="dint")
    whole = sum(p.numel() for p in model.parameters())
    root = 2048 * 128 + 128
    trained = sum(p.numel() for name, p in model.named_parameters() if ".attn." in name)
    forward = found["all-gather", "shard", "forward"]
    assert (forward.count, forward.bytes, forward.ranks) == (3 * 5, 3 * 2 * whole, 4)
    backward = found["all-gather", "shard", "backward"]
    assert (backward.count, backward.bytes) == (3 * 4, 3 * 2 * (whole - root))
    reduced = found["reduce-scatter", "shard", "backward"]
    assert (reduced.count, reduced.bytes) == (4, 4 * trained)
    replicated = found["all-reduce", "replicate", "backward"]
    assert (replicated.count, replicated.bytes, replicated.ranks) == (4, trained, 2)
    assert len(found) == 4


def test_wire_bytes_of_a_ring() -> None:
    gather = Traffic("all-gather", "shard", "forward", ranks=4, count=1, bytes=100, overlaps=True)
    assert gather.wire_bytes == 75
    assert replace(gather, kind="all-reduce").wire_bytes == 150


def test_tensor_and_context_collectives() -> None:
    """Two all-reduces a block and direction, of which one is recomputed; keys, values and second keys gathered, their
    gradients scattered."""
    model = local_model(planned_config(), 1)
    chosen = knobs(tensor=2, context=2, batch_size=2, checkpointing="full", passes=3)
    found = {
        (t.kind, t.dimension, t.phase): (t.count, t.bytes)
        for t in step_traffic({}, model, chosen, seq_len=512, element=2)
    }
    stream = 2 * 256 * 128 * 2
    keys = 2 * 512 * 1 * 32 * 2
    assert found["all-reduce", "tensor", "forward"] == (3 * 8, 3 * 8 * stream)
    assert found["all-reduce", "tensor", "backward"] == (3 * 8, 3 * 8 * stream)
    assert found["all-reduce", "tensor", "recomputation"] == (3 * 4, 3 * 4 * stream)
    assert found["all-gather", "context", "forward"] == (3 * 4 * 3, 3 * 4 * 3 * keys)
    assert found["all-gather", "context", "recomputation"] == found["all-gather", "context", "forward"]
    assert found["reduce-scatter", "context", "backward"] == (3 * 4 * 3, 3 * 4 * 3 * keys)


# ------------------------------------------------------------------ FLOPs and time


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_flops_are_those_of_the_counter(mode: str) -> None:
    counts = []
    for recompute in (False, True):
        model = llama3_2(**{**SIZES, "attention_backend": "eager", "intermediate_dim": 256, "embed_dim": 128})
        if recompute:
            checkpoint_activations(model, mode)
        tokens = torch.zeros(1, 128, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            model(tokens, labels=tokens).backward()
        counts.append(counter.get_total_flops() / 128)
    flops = count_flops(model, knobs(checkpointing=mode), 128)
    assert flops.full == training_flops_per_token(model, 128) == pytest.approx(counts[0], rel=0.01)
    full_square = flops.recomputed.total + flops.recomputed.attention  # the counter takes N x N
    if mode == "selective":  # keeps the products; the eager backend's are products like any other
        assert full_square == 0 == counts[1] - counts[0]
    else:
        assert full_square == pytest.approx(counts[1] - counts[0], rel=0.01)
    assert flops.full - flops.step.total == flops.step.attention


H100 = HARDWARE["h100"]
RATE = 0.5 * 989e12
WORK = Work(total=6e9, attention=1e9, linear=4e9)
FLOPS = Flops(full=7e9, step=WORK, forward=WORK * (1 / 3), recomputed=WORK * 0)


def time(traffic: list[Traffic], **changes: Any) -> Any:
    return estimate_time(
        FLOPS,
        traffic,
        knobs(shard=8, batch_size=4, passes=2, **changes),
        H100,
        Network(gpus_per_node=8, network_gb_per_s=50),
        seq_len=1000,
        dtype="bf16",
        attainable=0.5,
        update_bytes=int(3350e9),
    )


def test_time_bounds() -> None:
    compute = 8000 * 6e9 / RATE
    gather = Traffic("all-gather", "shard", "forward", 8, 1, int(450e9 * 8 / 7 * compute), True)
    found = time([gather])
    assert found.compute == pytest.approx(compute)
    assert found.optimizer == pytest.approx(1)
    assert found.overlapped == pytest.approx(compute)  # within the node: 450 GB/s
    # Hidden behind a forward pass of a third of the time it takes.
    assert found.fastest == pytest.approx(compute + compute * 2 / 3 + 1)
    assert found.slowest == pytest.approx(2 * compute + 1)
    assert found.tokens == 8 * 8000
    assert found.tokens_per_s == (pytest.approx(64_000 / found.fastest), pytest.approx(64_000 / found.slowest))
    assert found.mfu[0] == pytest.approx(8000 * 7e9 / (989e12 * found.fastest))
    assert found.causal_mfu[0] == pytest.approx(8000 * 6e9 / (989e12 * found.fastest))


def test_collectives_between_products_are_exposed() -> None:
    reduce = Traffic("all-reduce", "tensor", "backward", 2, 1, int(450e9), False)
    assert time([reduce], tensor=2).fastest - time([], tensor=2).fastest == pytest.approx(1)


def test_links() -> None:
    """A ring over more ranks than a node has goes at the network's speed."""
    gather = Traffic("all-gather", "shard", "forward", 16, 1, int(50e9 * 16 / 15), True)
    assert time([gather], tensor=2).overlapped == pytest.approx(1)


def test_tensor_parallel_ranks_share_the_products() -> None:
    assert time([], tensor=2).compute == pytest.approx(8000 * 6e9 / 2 / RATE)


def test_context_parallel_waits_for_the_last_rank() -> None:
    """Four contiguous parts of a causal sequence: the last has 7/16 of the attention, not a quarter."""
    assert time([], context=4).compute == pytest.approx(8000 * (5e9 / 4 + 1e9 * 7 / 16) / RATE)


def test_fp8_speeds_up_what_it_takes() -> None:
    assert time([], fp8=True).compute == pytest.approx(8000 * (2e9 / 989e12 + 4e9 / 1979e12) / 0.5)


# ------------------------------------------------------------------ what would make it fit


def with_memory(gib: float, **changes: Any) -> Target:
    options = {"world_size": 4, "gpu": "h100", "usable": 1.0, **changes}
    return PlanOptions(**options, hardware={"memory_gib": gib}).target


LARGER = {"batch_size": 4, "dtype": "bf16"}


def test_fits() -> None:
    found = plan(planned_config(**LARGER), with_memory(1.0))
    assert found.fits and found.timing is not None
    assert plan(planned_config(**LARGER), with_memory(0.01)).fits is False
    assert plan(planned_config(), cpu(2)).fits is None


def test_single_changes() -> None:
    """Each that is named fits when it is planned by itself, and the cheapest comes first."""
    cfg = planned_config(**LARGER)
    target = with_memory(0.06)
    with fake_world(4):
        planner = Planner(cfg, target)
        first = planner.evaluate(planner.knobs)
        assert first.fits is False
        advice = advise(planner, first)
    assert all(entry.fits and entry.peak <= 0.06 * GIB for entry in advice)
    assert advice[0].overrides == "enable_activation_checkpointing=true ac_mode=full"
    assert "batch_size=1 gradient_accumulation_steps=4" in [entry.overrides for entry in advice]
    changed = planned_config(**{**LARGER, "batch_size": 1, "gradient_accumulation_steps": 4})
    peaks = {entry.overrides: entry.peak for entry in advice}
    assert plan(changed, target).memory.total == peaks["batch_size=1 gradient_accumulation_steps=4"]


def test_changes_together() -> None:
    target = with_memory(0.016)
    with fake_world(4):
        planner = Planner(planned_config(**LARGER), target)
        advice = advise(planner, planner.evaluate(planner.knobs))
    assert len(advice) == 1 and advice[0].fits
    assert "ac_mode=full" in advice[0].overrides and "batch_size" in advice[0].overrides


def test_nothing_helps() -> None:
    with fake_world(4):
        planner = Planner(planned_config(**LARGER), with_memory(0.0001))
        advice = advise(planner, planner.evaluate(planner.knobs))
    assert len(advice) == 1 and not advice[0].fits


def test_changes_keep_the_global_batch() -> None:
    cfg = planned_config(batch_size=2, global_batch_size=16)
    with fake_world(4):
        planner = Planner(cfg, cpu(4))
        for change in changes(planner, planner.knobs):
            rows = change.knobs.batch_size * change.knobs.passes * change.knobs.data_parallel
            assert rows == (8 if "global_batch_size" in change.overrides[0] else 16), change.overrides
            ranks = change.knobs.data_parallel * change.knobs.tensor * change.knobs.context
            assert ranks == 4, change.overrides


def test_quantised_base_is_not_offered_where_it_is_trained() -> None:
    for trainable, offered in ((["adapter"], True), (["adapter", "attention"], False), (["all"], False)):
        with fake_world(4):
            planner = Planner(planned_config(trainable=trainable), cpu(4))
            found = [change.overrides[0] for change in changes(planner, planner.knobs)]
        assert ("quantize_base=nf4" in found) == offered


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer_in_bwd": True, "gradient_accumulation_steps": 4}, "optimizer_in_bwd=true: gradient_acc"),
        (
            {
                "context_parallel_dim": 2,
                "model": {
                    "_component_": "lrdint_tune.models.llama3_2",
                    **SMALL,
                    "method": "dint",
                    "integral": "sequence",
                    "allow_future_leak": True,
                },
            },
            "context_parallel_dim=2: integral='sequence'",
        ),
        (
            {"trainable": ["adapter"], "quantize_base": "nf4", "fsdp_cpu_offload": True, "world_size": 1},
            "fsdp_cpu_offload=true: with quantize_base='nf4'",
        ),
        ({"trainable": ["adapter"], "quantize_base": "nf4", "world_size": 3}, "3 shards do not divide the"),
        ({"tensor_parallel_dim": 2, "fp8": "tensorwise", "world_size": 2}, "tensor_parallel_dim=2: leaves parts of"),
    ],
    ids=["passes", "leak", "offloaded NF4", "NF4 rows", "fp8 parts"],
)
def test_what_training_refuses_is_refused(changes: dict[str, Any], message: str) -> None:
    changes = dict(changes)
    ranks = changes.pop("world_size", 4)
    model = {"embed_dim": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8} if "fp8" in changes else None
    with pytest.raises(ConfigError, match=message):
        plan(planned_config(model=model, **changes) if model else planned_config(**changes), cpu(ranks))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"optimizer_in_bwd": True},
        {"trainable": ["adapter"], "quantize_base": "nf4"},
        {"enable_activation_checkpointing": True, "ac_mode": "every_k", "ac_option": 2},
        {"fp8": "tensorwise"},
    ],
    ids=str,
)
def test_advice_is_what_the_command_line_takes(changed: dict[str, Any]) -> None:
    """Every single change that can be planned, given as its overrides, is the plan that it promised."""
    cfg = planned_config(**{**LARGER, **changed})
    base = dataclasses.asdict(cfg)
    base = {key: value for key, value in base.items() if value is not None}
    found = 0
    with fake_world(4):
        planner = Planner(cfg, with_memory(1.0))
        for change in changes(planner, planner.knobs):
            try:
                promised = planner.evaluate(change.knobs).memory.total
            except ConfigError:
                continue
            given = OmegaConf.create(base)
            for override in change.overrides:
                if override.startswith("~"):
                    *path, last = override[1:].split(".")
                    section = OmegaConf.select(given, ".".join(path)) if path else given
                    section.pop(last)
                else:
                    given.merge_with_dotlist([override])
            asked = Planner(load_config(given), with_memory(1.0))
            assert asked.evaluate(asked.knobs).memory.total == promised, change.overrides
            found += 1
    assert found >= 2


# ------------------------------------------------------------------ the command's keys


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "h100"}, "world_size: missing"),
        ({"world_size": 0, "gpu": "h100"}, "world_size=0"),
        ({"world_size": 8}, "gpu: missing; choose from .*h100.*or give hardware.bf16_tflops"),
        ({"world_size": 8, "gpu": "h1000"}, "gpu='h1000': unknown; choose from .*h100"),
        ({"world_size": 8, "gpu": "h100", "hardware": {"memory": 80}}, "hardware.memory=80: unknown; .*memory_gib"),
        ({"world_size": 8, "gpu": "h100", "hardware": {"memory_gib": "80"}}, "hardware.memory_gib='80'"),
        ({"world_size": 8, "gpu": "cpu", "hardware": {"memory_gib": 80}}, "gpu='cpu': takes no figures"),
        ({"world_size": 8, "gpu": "h100", "usable": 1.5}, "usable=1.5"),
        ({"world_size": 8, "gpu": "h100", "attainable": 0}, "attainable=0"),
        ({"world_size": 8, "gpu": "h100", "network_gb_per_s": 0}, "network_gb_per_s=0"),
        ({"world_size": 8, "gpu": "h100", "gpus_per_nod": 8}, "did you mean gpus_per_node"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(options, PlanOptions)


def test_given_figures() -> None:
    table = PlanOptions(world_size=1, gpu="h100", hardware={"memory_gib": 60}).target.hardware
    assert table is not None and table.memory_gib == 60 and table.bf16_tflops == H100.bf16_tflops
    figures = {
        "bf16_tflops": 100,
        "tf32_tflops": 50,
        "fp32_tflops": 20,
        "memory_gib": 24,
        "memory_gb_per_s": 1000,
        "link_gb_per_s": 32,
    }
    own = PlanOptions(world_size=1, hardware=figures).target.hardware
    assert own is not None and own.memory_gib == 24 and own.fp8_tflops is None
