"""What a run records: TensorBoard curves, the same numbers as JSON lines, and a progress bar."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

JSON_FILE = "metrics.jsonl"


class TensorBoardLogger:
    """Writes scalars to TensorBoard and to ``metrics.jsonl`` in ``log_dir``.

    A resumed run writes on into the same folder: everything recorded after the step it resumes from is dropped from
    both, so there is one curve.

    Args:
        log_dir: the folder that ``tensorboard --logdir`` is pointed at.
    """

    def __init__(self, log_dir: str) -> None:
        self.log_dir = Path(log_dir)
        self._writer: SummaryWriter | None = None

    def open(self, *, resumed_step: int) -> None:
        """Start recording after ``resumed_step`` (0 for a new run)."""
        self.log_dir.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads event files in the order of their names, which begin with a second: this one must be later.
        seconds = [int(old.name.split(".")[3]) for old in self.log_dir.glob("events.out.tfevents.*")]
        while int(time.time()) <= max(seconds, default=0):
            time.sleep(0.05)
        # Older event files stay; a new run hides all that is in them, its validation before step 1 included.
        self._writer = SummaryWriter(str(self.log_dir), purge_step=resumed_step + 1 if resumed_step else 0)
        self._file = self.log_dir / JSON_FILE
        lines = self._file.read_text().splitlines() if self._file.is_file() else []
        kept = [line for line in lines if line.endswith("}") and 0 < resumed_step >= json.loads(line)["step"]]
        partial = self._file.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in kept))
        os.replace(partial, self._file)

    def log(self, values: dict[str, float], step: int) -> None:
        """Record ``values`` (tag -> number) at optimizer step ``step``; NaN and infinity are left out, as JSON has
        neither: a gap in the curve."""
        assert self._writer is not None, "open() first"
        values = {tag: value for tag, value in values.items() if math.isfinite(value)}
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()
        with open(self._file, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def history(self, tag: str) -> list[tuple[int, float]]:
        """``(step, value)`` of everything recorded under ``tag``, earlier parts of a resumed run included."""
        lines = [json.loads(line) for line in self._file.read_text().splitlines()]
        return [(line["step"], line[tag]) for line in lines if tag in line]

    def log_text(self, tag: str, text: str) -> None:
        assert self._writer is not None, "open() first"
        self._writer.add_text(tag, text)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


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
        """The rates since the last call, with torchtitan's tag names; starts anew."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        tps = self._tokens / seconds
        per_device = tps / self.world_size / 1e12
        values = {
            "throughput(tps)": tps,
            "tflops": per_device * self.flops_per_token,
            "tflops_causal": per_device * self.causal_flops_per_token,
            "time_metrics/end_to_end(s)": seconds / max(self._steps, 1),
            "time_metrics/data_loading(s)": self._data_seconds / max(self._steps, 1),
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
