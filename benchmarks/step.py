"""One training step of ``none``, ``dint`` and the seeds' own N x N listing, side by side: time, FLOPs and peak memory.

    python benchmarks/step.py --sizes llama3_2_1b --lengths 512 1024 2048 4096 --threads 2 --out step.json

For each size and length three scopes are measured: ``attention`` (the module, forward + backward), ``layer`` (the whole
layer, forward + backward) and ``step`` (two layers and the loss: forward, backward, AdamW). Attention and adapter are
trained, the rest is frozen. Batch 1.

The ratio that the FLOPs allow is FLOPs(variant) / FLOPs(none) with attention maps counted at the causal half, or whole
where that allows less. ``x FLOPs`` is the time ratio over it: 1.00 means that a FLOP costs what it costs ``none``.
``listing/`` is the listing's time over the variant's. Peak memory is that above weights and optimizer state.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run by its path, uninstalled

from benchmarks.inputs import SCOPES, SIZES, VARIANTS, Case, build_models  # noqa: E402
from benchmarks.measure import (  # noqa: E402
    available_bytes,
    count_flops,
    interleaved_seconds,
    peak_bytes,
    predicted_listing_bytes,
)

GB = 1e9
COLUMNS = {
    "size": -13,
    "N": 5,
    "scope": -9,
    "variant": -7,
    "seconds": 8,
    "x none": 6,
    "allowed": 7,
    "x FLOPs": 7,
    "listing/": 8,
    "peak GB": 8,
    "GFLOP": 8,
    "full N^2": 8,
}  # title -> width, negative: left-aligned
Row = dict[str, Any]


def measure(size_name: str, length: int, *, repeats: int, device: str, dtype: torch.dtype) -> Iterator[Row]:
    """The rows of one size and length, scope by scope."""
    size = SIZES[size_name]
    models = build_models(size, length, device=device, dtype=dtype)
    for scope in SCOPES:
        cases, peaks, notes = {}, {}, {}
        for variant in VARIANTS:
            if variant == "listing":
                needed = predicted_listing_bytes(size, scope, length, dtype)
                free = available_bytes(device)
                if needed > 0.9 * free:
                    notes[variant] = f"does not fit: needs {needed / GB:.1f} GB, {free / GB:.1f} GB available"
                    continue
            cases[variant] = Case(models[variant], scope, length)
            peaks[variant] = peak_bytes(cases[variant])  # the warm-up run too
        seconds = interleaved_seconds(cases, repeats)
        base = count_flops(size, "none", scope, length)
        for variant in VARIANTS:
            flops = count_flops(size, variant, scope, length)
            allowed = min(flops.causal / base.causal, flops.full / base.full)
            ratio = _median_ratio(seconds, variant, "none")
            yield {
                "size": size_name,
                "length": length,
                "scope": scope,
                "variant": variant,
                "seconds": seconds.get(variant),
                "median_seconds": statistics.median(seconds[variant]) if variant in seconds else None,
                "time_ratio": ratio,
                "flops_full": flops.full,
                "flops_causal": flops.causal,
                "flop_ratio_full": flops.full / base.full,
                "flop_ratio_causal": flops.causal / base.causal,
                "allowed_ratio": allowed,
                "time_over_allowed": ratio / allowed if ratio is not None else None,
                "speed_vs_listing": _median_ratio(seconds, "listing", variant),
                "peak_bytes": peaks.get(variant),
                "note": notes.get(variant),
            }


def _median_ratio(seconds: dict[str, list[float]], numerator: str, denominator: str) -> float | None:
    if numerator not in seconds or denominator not in seconds:
        return None
    return statistics.median(a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True))


def memory_growth(rows: list[Row]) -> list[Row]:
    """Peak memory of the step at ``2 N`` over that at ``N``, wherever both were measured."""
    peaks = {(r["size"], r["variant"], r["length"]): r["peak_bytes"] for r in rows if r["scope"] == "step"}
    return [
        {"size": size, "variant": variant, "from": n, "to": 2 * n, "ratio": peaks[size, variant, 2 * n] / peak}
        for (size, variant, n), peak in peaks.items()
        if peak and peaks.get((size, variant, 2 * n))
    ]


def _line(row: Row) -> str:
    def number(value: float | None, pattern: str) -> str:
        return "-" if value is None else format(value, pattern)

    cells = (
        row["size"],
        str(row["length"]),
        row["scope"],
        row["variant"],
        number(row["median_seconds"], ".3f"),
        number(row["time_ratio"], ".2f"),
        f"{row['allowed_ratio']:.2f}",
        number(row["time_over_allowed"], ".2f"),
        number(row["speed_vs_listing"], ".2f"),
        "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GB:.3f}",
        f"{row['flops_causal'] / 1e9:.1f}",
        f"{row['flops_full'] / 1e9:.1f}",
    )
    return _aligned(cells) + (f"  {row['note']}" if row["note"] else "")


def _aligned(cells: Iterable[str]) -> str:
    widths = COLUMNS.values()
    return " ".join(c.rjust(w) if w > 0 else c.ljust(-w) for c, w in zip(cells, widths, strict=True))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["llama3_2_1b", "smollm2_135m"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]

    print(_aligned(COLUMNS), flush=True)
    rows = []
    for size in options.sizes:
        for length in options.lengths:
            for row in measure(size, length, repeats=options.repeats, device=device, dtype=dtype):
                rows.append(row)
                print(_line(row), flush=True)
    growth = memory_growth(rows)
    for g in growth:
        title = f"peak memory of the step, {g['size']} {g['variant']}"
        print(f"{title}: N = {g['to']} takes {g['ratio']:.2f} times N = {g['from']}")
    if options.out:
        report = {
            "command": shlex.join([Path(sys.executable).name, *(sys.argv if arguments is None else arguments)]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "threads": options.threads,
            "device": device,
            "dtype": options.dtype,
            "repeats": options.repeats,
            "sizes": {name: vars(SIZES[name]) for name in options.sizes},
            "rows": rows,
            "memory_growth": growth,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
