"""What a run shows and counts while it goes: rates, memory and a progress bar."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from tqdm import tqdm


class Throughput:
    """Tokens per second, TFLOP/s and MFU between two logged steps.

    ``tflops`` counts attention over the full ``N x N`` maps, ``tflops_causal`` over their lower triangle. ``mfu(%)`` is
    ``tflops`` in percent of the device's peak: what the method needs, recomputation not counted, over what the device
    could do. Without a known peak there is no such tag.

    Args:
        flops_per_token: of a forward and backward pass, attention over the full maps.
        causal_flops_per_token: the same with attention over their lower triangle.
        world_size: TFLOP/s are reported per device, tokens/s over all.
        peak_tflops: of one device, in TFLOP/s; None if it is not known.
    """

    def __init__(
        self,
        *,
        flops_per_token: float,
        causal_flops_per_token: float,
        world_size: int,
        peak_tflops: float | None = None,
    ) -> None:
        self.flops_per_token = flops_per_token
        self.causal_flops_per_token = causal_flops_per_token
        self.world_size = world_size
        self.peak_tflops = peak_tflops
        self.reset()

    def reset(self) -> None:
        self._start = time.perf_counter()
        self._tokens = 0.0
        self._data_seconds = 0.0
        self._steps = 0

    def add(self, tokens: float, data_seconds: float) -> None:
        """Count one step: all its input tokens (padding excluded), and how long it waited for data."""
        self._tokens += tokens
        self._data_seconds += data_seconds
        self._steps += 1

    def take(self) -> dict[str, float]:
        """The rates since the last call, with torchtitan's tag names; starts anew. The two under ``throughput/`` are
        there again by names that TensorBoard's custom scalars can show."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        tps = self._tokens / seconds
        per_device = tps / self.world_size / 1e12
        values = {
            "throughput(tps)": tps,
            "tflops": per_device * self.flops_per_token,
            "tflops_causal": per_device * self.causal_flops_per_token,
            "time_metrics/end_to_end(s)": seconds / max(self._steps, 1),
            "time_metrics/data_loading(s)": self._data_seconds / max(self._steps, 1),
            "throughput/tokens_per_second": tps,
            "throughput/seconds_per_step": seconds / max(self._steps, 1),
        }
        if self.peak_tflops is not None:
            values["mfu(%)"] = 100 * values["tflops"] / self.peak_tflops
        self.reset()
        return values


def memory_values(device: torch.device) -> dict[str, float]:
    """Peak memory in GiB: the CUDA allocator's, or on a CPU the process's resident size. On CUDA also how often an
    allocation had to be tried again after freeing cached memory (each time is slow), and how often it failed."""
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        return {
            "memory/max_active(GiB)": torch.cuda.max_memory_allocated(device) / 2**30,
            "memory/max_reserved(GiB)": torch.cuda.max_memory_reserved(device) / 2**30,
            "memory/num_alloc_retries": stats["num_alloc_retries"],
            "memory/num_ooms": stats["num_ooms"],
        }
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 2**10
    return {"memory/max_rss(GiB)": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


class Progress:
    """A tqdm bar over all optimizer steps with loss and tokens/s; tqdm adds the ETA."""

    def __init__(self, total: int, done: int, *, enabled: bool) -> None:
        self._bar: Any = tqdm(total=total, initial=done, desc="step", dynamic_ncols=True, disable=not enabled)

    def update(self, loss: float, tps: float) -> None:
        self._bar.set_postfix(loss=f"{loss:.4f}", tok_s=f"{tps:,.0f}", refresh=False)
        self._bar.update()

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        if not self._bar.disable:
            self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
