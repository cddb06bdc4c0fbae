"""Bounds on a step's time from given figures of the hardware. Nothing here was measured on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.planning.communication import BACKWARD, FORWARD, RECOMPUTATION, Traffic
from lrdint_tune.planning.knobs import Knobs
from lrdint_tune.training.flops import training_flops_per_token
from lrdint_tune.training.hardware import Hardware
from lrdint_tune.training.precision import takes_fp8


@dataclass(frozen=True)
class Work:
    """Floating-point operations per token that a device really does: attention over the causal half.

    Attributes:
        total: all of them.
        attention: those of the maps among them.
        linear: those of the blocks' pretrained linear layers among them, which fp8 can take.
    """

    total: float
    attention: float
    linear: float

    def __mul__(self, share: float) -> Work:
        return Work(share * self.total, share * self.attention, share * self.linear)


@dataclass(frozen=True)
class Flops:
    """Of the whole model, per token.

    Attributes:
        full: of a forward and backward pass, attention over ``N x N``, as torch counts it.
        step: the same with the causal half.
        forward: of the forward pass among them.
        recomputed: what activation checkpointing computes again, beside them.
    """

    full: float
    step: Work
    forward: Work
    recomputed: Work


def count_flops(model: LlamaDecoder, knobs: Knobs, seq_len: int) -> Flops:
    """Of ``model`` whole, with ``requires_grad`` set."""
    spec = model.spec
    full = training_flops_per_token(model, seq_len)
    maps = sum(method.num_maps for method in model.methods()) * 12.0 * seq_len * spec.num_heads * spec.head_dim
    linears = [linear.weight for linear in model.base_linears().values() if takes_fp8(linear)]
    # Without trained weights a forward pass is half of what is counted, and of the maps always a third.
    frozen = copy.deepcopy(model).requires_grad_(False)
    products = (training_flops_per_token(frozen, seq_len) - maps) / 2
    head = 2.0 * spec.vocab_size * spec.embed_dim
    forward = Work(products + maps / 6, maps / 6, sum(2.0 * p.numel() for p in linears))
    linear = sum((6.0 if p.requires_grad else 4.0) * p.numel() for p in linears)
    # Selective checkpointing keeps the products. Otherwise a recomputation ends where nothing more is wanted: before
    # the MLP's last one.
    last = sum(2.0 * p.numel() for name, p in model.named_parameters() if name.endswith(".mlp.w2.weight"))
    block = Work(forward.total - head - last, forward.attention, forward.linear - last)
    again = 0 if knobs.checkpointing == "selective" else knobs.num_checkpointed(spec.num_layers) / spec.num_layers
    return Flops(
        full=full,
        step=Work(full - maps / 2, maps / 2, linear),
        forward=forward,
        recomputed=block * again,
    )


@dataclass(frozen=True)
class Network:
    """Where the ranks are.

    Attributes:
        gpus_per_node: ranks that share a node's links.
        network_gb_per_s: to other nodes, per GPU, in one direction, in GB/s.
    """

    gpus_per_node: int
    network_gb_per_s: float


@dataclass(frozen=True)
class Timing:
    """Seconds of an optimizer step: it takes at least ``fastest`` (all that can overlap does) and about ``slowest``
    when nothing overlaps; rates are given for both, the higher first.

    Attributes:
        compute: of products, at the attainable share of the peak.
        exposed: of collectives that stand between two products.
        overlapped: of collectives that can run beside products.
        optimizer: of the update, which reads and writes its tensors once.
        tokens: of a step, over all ranks.
        mfu: model FLOPs (full ``N x N``, no recomputation) over the peak, as the log of a run has it.
        causal_mfu: with the causal half.
    """

    compute: float
    exposed: float
    overlapped: float
    optimizer: float
    fastest: float
    slowest: float
    tokens: int
    tokens_per_s: tuple[float, float]
    mfu: tuple[float, float]
    causal_mfu: tuple[float, float]


def estimate_time(
    flops: Flops,
    traffic: Sequence[Traffic],
    knobs: Knobs,
    hardware: Hardware,
    network: Network,
    *,
    seq_len: int,
    dtype: str,
    attainable: float,
    update_bytes: int,
) -> Timing:
    """Bounds for one step.

    Tensor-parallel ranks split the blocks and the tokens of the loss. With context parallelism the sequence
    is cut into contiguous parts; the last rank's queries see nearly all keys, so its attention takes ``2 - 1 /
    context`` times the mean, and everybody waits for it.

    Args:
        attainable: share of the peak that products reach, with everything between them.
        update_bytes: that the optimizer reads and writes on a rank.
    """
    peak = (hardware.bf16_tflops if dtype == "bf16" else hardware.fp32_tflops) * 1e12
    linear_peak = (hardware.fp8_tflops or hardware.bf16_tflops) * 1e12 if knobs.fp8 else peak
    tokens = knobs.batch_size * seq_len * knobs.passes  # of a data-parallel rank
    imbalance = 2 - 1 / knobs.context

    def seconds(work: Work) -> float:
        other = work.total - work.attention - work.linear
        split = (other + imbalance * work.attention) / peak + work.linear / linear_peak
        return tokens / knobs.context * split / knobs.tensor / attainable

    forward = seconds(flops.forward)
    compute = seconds(flops.step) + seconds(flops.recomputed)

    times = {phase: [0.0, 0.0] for phase in (FORWARD, BACKWARD, RECOMPUTATION)}
    for part in traffic:
        link = _link(part, knobs, hardware, network)
        times[part.phase][part.overlaps] += part.wire_bytes / (link * 1e9)
    exposed = sum(waiting for waiting, _ in times.values())
    overlapped = sum(beside for _, beside in times.values())
    optimizer = update_bytes / (hardware.memory_gb_per_s * 1e9)
    passes = max(forward, times[FORWARD][True]) + max(compute - forward, times[BACKWARD][True])
    fastest = passes + exposed + optimizer
    slowest = compute + overlapped + exposed + optimizer
    of_all = tokens * knobs.data_parallel
    ranks = knobs.data_parallel * knobs.context * knobs.tensor

    def rates(amount: float) -> tuple[float, float]:
        return amount / fastest, amount / slowest

    return Timing(
        compute=compute,
        exposed=exposed,
        overlapped=overlapped,
        optimizer=optimizer,
        fastest=fastest,
        slowest=slowest,
        tokens=of_all,
        tokens_per_s=rates(of_all),
        mfu=rates(of_all * flops.full / (ranks * peak)),
        causal_mfu=rates(of_all * flops.step.total / (ranks * peak)),
    )


def _link(part: Traffic, knobs: Knobs, hardware: Hardware, network: Network) -> float:
    """GB/s of the slowest link in a ring: neighbours in the mesh are ``tensor``, then ``context``, then ``shard``."""
    span = {
        "tensor": knobs.tensor,
        "context": knobs.tensor * knobs.context,
        "shard": knobs.tensor * knobs.fsdp,
        "replicate": knobs.tensor * knobs.fsdp * knobs.replicate,
    }[part.dimension]
    if span <= network.gpus_per_node:
        return hardware.link_gb_per_s
    return min(hardware.link_gb_per_s, network.network_gb_per_s)
