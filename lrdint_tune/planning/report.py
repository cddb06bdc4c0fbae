"""A plan as a text for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from lrdint_tune.planning.advice import Advice
from lrdint_tune.planning.memory import KINDS
from lrdint_tune.planning.plan import Plan, Target

GIB = 2**30


def as_text(plan: Plan, target: Target, advice: Sequence[Advice]) -> str:
    """The report of the ``plan`` command."""
    return "\n".join(_lines(plan, target, advice))


def _lines(plan: Plan, target: Target, advice: Sequence[Advice]) -> Iterator[str]:
    knobs, hardware = plan.knobs, target.hardware
    name = "CPU process" if hardware is None else hardware.name
    yield f"ESTIMATE for {target.world_size} x {name}; nothing was measured there"
    yield (
        f"model      method {plan.spec.method}, {plan.num_parameters / 1e9:.3g} B parameters, "
        f"{plan.num_trained / 1e9:.3g} B of them trained"
    )
    yield (
        f"mesh       replicate {knobs.replicate} x shard {knobs.shard} x context {knobs.context} x tensor "
        f"{knobs.tensor}"
    )
    tokens = knobs.batch_size * knobs.passes * knobs.data_parallel * plan.seq_len
    yield (
        f"step       {knobs.batch_size} sequences x {plan.seq_len} tokens x {knobs.passes} passes x "
        f"{knobs.data_parallel} data-parallel ranks = {tokens:,} tokens"
    )
    yield ""
    yield f"memory of a rank in GiB, at its peak: {plan.memory.moment}"
    for kind in KINDS:
        yield f"  {kind:<24}{plan.memory.peak[kind] / GIB:>10.3f}"
    yield f"  {'total':<24}{plan.memory.total / GIB:>10.3f}{_verdict(plan, target)}"
    if plan.memory.host:
        yield f"  {'in the CPU, beside it':<24}{plan.memory.host / GIB:>10.3f}"
    if advice:
        yield from _advice_lines(advice)
    yield ""
    flops = plan.flops
    yield (
        f"FLOPs per token: {flops.full:.4g} with attention over N x N, {flops.step.total:.4g} with its causal half; "
        f"recomputed beside these: {flops.recomputed.total:.3g}"
    )
    yield ""
    yield f"collectives of a rank in a step{'':<9}{'ranks':>6}{'number':>8}{'GiB':>10}{'sent, GiB':>12}"
    for part in plan.traffic:
        what = f"{part.kind} over {part.dimension}, {part.phase}"
        yield f"  {what:<38}{part.ranks:>6}{part.count:>8}{part.bytes / GIB:>10.3f}{part.wire_bytes / GIB:>12.3f}"
    if not plan.traffic:
        yield "  none"
    yield ""
    yield from _time_lines(plan, target)


def _verdict(plan: Plan, target: Target) -> str:
    if plan.memory_limit is None or target.hardware is None:
        return "  of an unknown amount"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    return f"  of {plan.memory_limit / GIB:.1f} ({target.usable:.0%} of {target.hardware.memory_gib:g}): {verdict}"


def _advice_lines(advice: Sequence[Advice]) -> Iterator[str]:
    if advice[0].fits:
        yield "what would make it fit, the cheapest first, and the peak with it:"
    else:
        yield "no knob nor all of them together make it fit; the least:"
    for entry in advice:
        yield f"  {entry.peak / GIB:>8.1f} GiB  {entry.overrides}"
        yield f"  {'':<14}({entry.cost})"


def _time_lines(plan: Plan, target: Target) -> Iterator[str]:
    timing, hardware = plan.timing, target.hardware
    if timing is None or hardware is None:
        yield "time of a step: unknown, no figures of the hardware; give gpu= or hardware.*"
        return
    yield f"time of a step in s: {timing.fastest:.3g} if all overlaps that can, {timing.slowest:.3g} if nothing does"
    yield f"  {'products':<24}{timing.compute:>10.3g}  at {target.attainable:.0%} of the peak"
    yield f"  {'collectives, hidden':<24}{timing.overlapped:>10.3g}  where products take longer"
    yield f"  {'collectives, exposed':<24}{timing.exposed:>10.3g}"
    yield f"  {'optimizer':<24}{timing.optimizer:>10.3g}"
    yield f"  {'tokens/s':<24}{_both(timing.tokens_per_s, ',.0f')}"
    of = ", of the bf16 peak" if plan.knobs.fp8 else ""
    yield f"  {'MFU, N x N':<24}{_both(timing.mfu, '.1%')}  (as a run's log has it{of})"
    yield f"  {'MFU, causal half':<24}{_both(timing.causal_mfu, '.1%')}"
    if plan.knobs.context > 1:
        longest = 2 - 1 / plan.knobs.context
        yield f"  the last rank of a sequence has {longest:.2f} times the mean of attention, and the others wait"
    if plan.knobs.cpu_offload or plan.knobs.activation_offloading:
        yield "  the ways to the CPU and its update are not in it"


def _both(rates: tuple[float, float], pattern: str) -> str:
    return f"at most {rates[0]:{pattern}}, {rates[1]:{pattern}} if nothing overlaps"


def as_json(plan: Plan, target: Target, advice: Sequence[Advice]) -> dict[str, Any]:
    """Everything of the report, in bytes, seconds and FLOPs."""
    return {
        "estimate": True,
        "target": dataclasses.asdict(target),
        "plan": {**dataclasses.asdict(plan), "peak_bytes": plan.memory.total, "fits": plan.fits},
        "advice": [dataclasses.asdict(entry) for entry in advice],
    }
