"""Time, FLOPs and memory of a :class:`~benchmarks.inputs.Case`."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.inputs import Case, Size, build_model
from lrdint_tune.attention import Layout, integral


def interleaved_seconds(cases: dict[str, Case], repeats: int) -> dict[str, list[float]]:
    """Seconds per repetition, the variants taking turns.

    What disturbs the machine disturbs them alike, so ratios within a repetition hold even where the seconds do not.
    """
    seconds: dict[str, list[float]] = {variant: [] for variant in cases}
    for _ in range(repeats):
        for variant, case in cases.items():
            _synchronize(case)
            start = time.perf_counter()
            case.run()
            _synchronize(case)
            seconds[variant].append(time.perf_counter() - start)
    return seconds


def _synchronize(case: Case) -> None:
    if case.x.is_cuda:
        torch.cuda.synchronize(case.x.device)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one forward and backward.

    Attributes:
        full: as torch counts them, every attention map at ``N x N``.
        causal: with half of each map, which is all that a causal kernel has to compute.
    """

    full: int
    causal: int


def count_flops(size: Size, variant: str, scope: str, length: int) -> Flops:
    """Counted on the eager backend (the counter does not see into fused kernels), on the meta device.

    The matrix products of the prefix mean are left out: they stand for ``N H hd`` additions, and counting them would
    raise what is allowed. The listing computes its maps whole, so both figures are the same for it.
    """
    with torch.device("meta"):
        # Scaled RoPE frequencies need real numbers; the rotation has no counted products either way.
        model = build_model(replace(size, scale_factor=1), variant, length, attention_backend="eager")
    full = _counted(Case(model, scope, length))
    if variant == "listing":
        return Flops(full, full)
    layers = size.num_layers if scope == "step" else 1
    shape = size.shape
    maps = 1
    if variant == "dint":
        maps = 2
        full -= layers * _prefix_mean_flops(shape.num_heads, length, shape.head_dim)
    # A map costs two products forward (q k^T, A v) and four backward.
    products = layers * maps * 6 * 2 * length**2 * shape.num_heads * shape.head_dim
    return Flops(full, full - products // 2)


def _counted(case: Case) -> int:
    with FlopCounterMode(display=False) as counter:
        case.forward_backward()
    return counter.get_total_flops()


def _prefix_mean_flops(heads: int, length: int, head_dim: int) -> int:
    o = torch.empty(1, heads, length, head_dim, device="meta", requires_grad=True)
    lam = torch.empty(heads, 1, 1, device="meta")
    with FlopCounterMode(display=False) as counter:
        out = integral(o, o, lam, Layout(None, None, num_queries=length, device="meta"))
        out.backward(torch.empty_like(out))
    return counter.get_total_flops()


def peak_bytes(case: Case) -> int:
    """The most that one run holds above what was there before it (weights, optimizer state, inputs).

    From the allocator itself, so exact, with the kernels' own temporaries.
    """
    if case.x.is_cuda:
        torch.cuda.reset_peak_memory_stats(case.x.device)
        resting = torch.cuda.memory_allocated(case.x.device)
        case.run()
        return torch.cuda.max_memory_allocated(case.x.device) - resting
    with muted_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        case.run()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    held = peak = 0
    for _, size in sorted(allocations(profiler.profiler.kineto_results.experimental_event_tree())):
        held += size
        peak = max(peak, held)
    return peak


@contextmanager
def muted_stderr() -> Iterator[None]:
    """The profiler's C++ side reports each start and stop in the middle of the table."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def allocations(events: Iterable) -> Iterable[tuple[int, int]]:
    """``(time, bytes)`` of every allocation (positive) and release (negative) in the tree."""
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from allocations(event.children)


def predicted_listing_bytes(size: Size, scope: str, length: int, dtype: torch.dtype) -> int:
    """What :func:`peak_bytes` will find for the listing: a quadratic in ``N``, fixed by three short lengths."""
    short = (64, 128, 256)
    peaks = [peak_bytes(Case(build_model(size, "listing", n).to(dtype), scope, n)) for n in short]
    return round(
        sum(
            peak * math.prod((length - other) / (n - other) for other in short if other != n)
            for n, peak in zip(short, peaks, strict=True)
        )
    )


def available_bytes(device: str) -> int:
    """Memory that is free to use."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as lines:
        fields = dict(line.split(":") for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024
