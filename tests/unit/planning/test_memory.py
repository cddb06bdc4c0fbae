"""The course of a step, against peaks worked out by hand."""

from dataclasses import replace
from typing import Any

from lrdint_tune.planning.memory import (
    ACTIVATIONS,
    GATHERED,
    GRADIENTS,
    IN_FLIGHT,
    LOSS,
    OPTIMIZER,
    OTHER,
    PARAMETERS,
    Memory,
    estimate_memory,
)
from lrdint_tune.planning.parts import Part, Parts
from lrdint_tune.planning.skeleton import ROOT, Group, Skeleton
from tests.common.plans import knobs

# bf16 on two shards: gathered in 2 bytes what is 4 at rest; 10 of 20 elements trained.
BLOCK = Group(sharded=40, gathered=40, sent=40, cast=20, trained=10, gradients=20, largest=40)
EMBEDDING = Group(sharded=100, gathered=100, sent=100)
NOTHING = Part(0, 0, 0, 0, 0, 0)
SMALL = Part(inputs=1, forward=2, kept=2, backward=3, gradients=0, left=0)
STATE = 80


def estimate(layers: int = 3, device: str = "cuda", root: Group = EMBEDDING, **changes: Any) -> Memory:
    """``changes`` are knobs, or the parts ``block`` and ``loss``."""
    block, loss = (changes.pop(name, default) for name, default in (("block", SMALL), ("loss", NOTHING)))
    modes = {False: block, True: block}
    parts = Parts(embedding=NOTHING, first=modes, middle=modes, loss=loss, layout=5)
    skeleton = Skeleton({ROOT: root, **{f"layers.{i}": BLOCK for i in range(layers)}}, [], buffers=7)
    return estimate_memory(skeleton, parts, (STATE, 0), knobs(**changes), num_layers=layers, device=device)


def test_at_rest() -> None:
    peak = estimate().peak
    assert peak[PARAMETERS] == 100 + 3 * 40
    assert peak[OPTIMIZER] == STATE
    assert peak[OTHER] == 5 + 7


def test_peak_in_the_loss() -> None:
    """Everything that the blocks keep, the logits, and the last block's gather buffer beside the root."""
    memory = estimate(
        loss=Part(inputs=1, forward=1000, kept=10, backward=20, gradients=0, left=0), block=replace(SMALL, kept=50)
    )
    assert memory.moment == "loss"
    assert memory.peak[LOSS] == 999
    assert memory.peak[ACTIVATIONS] == 3 * 50 + 1
    assert memory.peak[GATHERED] == 100 + 40
    assert memory.peak[GRADIENTS] == memory.peak[IN_FLIGHT] == 0


def test_peak_in_a_block() -> None:
    """The last block's backward pass comes first, when the others' activations are all still there, with its parameters
    and the buffer of the block before."""
    memory = estimate(block=Part(inputs=1, forward=2, kept=500, backward=1000, gradients=8, left=20))
    assert memory.moment == "backward pass of a block"
    assert memory.peak[ACTIVATIONS] == 2 * 500 + 1000
    assert memory.peak[GATHERED] == 100 + 40 + 40
    assert memory.peak[IN_FLIGHT] == 8 and memory.peak[GRADIENTS] == 0


def test_peak_in_the_reduction() -> None:
    """The first block's: the others' shards of gradients, its own bf16 gradients and their float32 copy."""
    many = replace(BLOCK, trained=10_000, gradients=20_000)
    skeleton = Skeleton({ROOT: EMBEDDING, "layers.0": many, "layers.1": BLOCK}, [], buffers=0)
    modes = {False: SMALL}
    parts = Parts(embedding=NOTHING, first=modes, middle=modes, loss=NOTHING, layout=0)
    memory = estimate_memory(skeleton, parts, (0, 0), knobs(), num_layers=2, device="cuda")
    assert memory.moment == "reduce-scatter"
    assert memory.peak[IN_FLIGHT] == 40_000 + 20_000
    assert memory.peak[GRADIENTS] == 20


def test_head_gradients_wait_for_the_end() -> None:
    """The root's parameters are reduced last, the head's gradients were there first."""
    memory = estimate(
        loss=replace(NOTHING, left=300), block=Part(inputs=1, forward=2, kept=500, backward=1000, gradients=0, left=20)
    )
    assert memory.moment == "backward pass of a block"
    assert memory.peak[IN_FLIGHT] == 300


def test_a_peak_is_of_one_moment() -> None:
    """Not the sum of the parts' peaks."""
    block = Part(inputs=1, forward=2, kept=50, backward=1000, gradients=0, left=0)
    loss = Part(inputs=1, forward=1000, kept=10, backward=20, gradients=0, left=0)
    memory = estimate(block=block, loss=loss)
    assert (memory.peak[LOSS] == 0) != (memory.peak[ACTIVATIONS] < 1000)
    assert memory.total == sum(memory.peak.values())


def test_several_passes_hold_whole_gradients() -> None:
    """In float32, of everything trained, until each is reduced."""
    one, two = (estimate(passes=n, block=replace(SMALL, kept=500, backward=1000)) for n in (1, 2))
    assert two.peak[IN_FLIGHT] - one.peak[IN_FLIGHT] == 3 * 40
    assert two.total - one.total == 3 * 40


def test_without_resharding_everything_stays_gathered() -> None:
    memory = estimate(reshard=False, block=replace(SMALL, kept=500, backward=1000))
    assert memory.peak[GATHERED] == 100 + 3 * 40


def test_one_shard_copies_its_parameters() -> None:
    """FSDP computes on a copy even where there is nothing to gather, one block's at a time; there are no buffers."""
    memory = estimate(shard=1, block=replace(SMALL, kept=500, backward=1000))
    assert memory.peak[GATHERED] == 100 + 40


def test_gloo_gathers_through_a_copy() -> None:
    root = replace(EMBEDDING, gathered=1000, sent=1000)
    cpu, cuda = (estimate(device=device, root=root) for device in ("cpu", "cuda"))
    assert cpu.moment == cuda.moment == "all-gather"
    assert cuda.peak[GATHERED] == 1000 + 1000 + 40 + 20  # the root and its buffer, the first block's buffer and cast
    assert cpu.peak[GATHERED] == cuda.peak[GATHERED] + 40
    last = replace(BLOCK, trained=1000, gradients=0)
    skeleton = Skeleton({ROOT: EMBEDDING, "layers.0": last}, [], buffers=0)
    parts = Parts(NOTHING, {False: NOTHING}, {False: NOTHING}, NOTHING, 0)
    both = [
        estimate_memory(skeleton, parts, (0, 0), knobs(), num_layers=1, device=device).peak[IN_FLIGHT]
        for device in ("cpu", "cuda")
    ]
    assert both == [8000, 4000]


def test_offloading_parameters() -> None:
    memory = estimate(cpu_offload=True)
    assert memory.peak[PARAMETERS] == memory.peak[OPTIMIZER] == memory.peak[GRADIENTS] == 0
    assert memory.host == 100 + 3 * 40 + STATE + 3 * 20


def test_offloading_activations() -> None:
    """One block's stay, and the one's that is being fetched; the rest is on the host."""
    block = Part(inputs=1, forward=2, kept=50, backward=1000, gradients=0, left=0)
    memory = estimate(layers=5, activation_offloading=True, block=block)
    assert memory.peak[ACTIVATIONS] == 50 + 1000
    assert memory.host == 4 * 50


def test_updates_in_the_backward_pass_free_gradients() -> None:
    trained = replace(EMBEDDING, trained=1000, gradients=0)
    memory = [estimate(optimizer_in_bwd=flag, root=trained) for flag in (False, True)]
    assert [m.peak[GRADIENTS] for m in memory] == [2000 + 3 * 20, 2000]


def test_weights_are_converted_one_by_one() -> None:
    """NF4 to bf16, bf16 to fp8, unless it was gathered in fp8."""
    block = replace(SMALL, kept=500, backward=1000)
    plain, nf4, fp8, gathered = (
        estimate(block=block, **flags).peak[GATHERED]
        for flags in ({}, {"nf4": True}, {"fp8": True}, {"fp8": True, "fp8_all_gather": True})
    )
    assert (nf4 - plain, fp8 - plain, gathered - plain) == (40, 20, 0)


def test_every_second_block() -> None:
    """Checkpointing ``every_k`` counts the blocks that it takes."""
    modes = {False: replace(SMALL, kept=100), True: replace(SMALL, kept=1)}
    parts = Parts(NOTHING, modes, modes, replace(NOTHING, forward=5000), 0)
    skeleton = Skeleton({ROOT: EMBEDDING, **{f"layers.{i}": BLOCK for i in range(5)}}, [], buffers=0)
    memory = estimate_memory(
        skeleton, parts, (0, 0), knobs(checkpointing="every_k", every=2), num_layers=5, device="cuda"
    )
    assert memory.peak[ACTIVATIONS] == 2 * 1 + 3 * 100
