"""Writes the tables of docs/scaling.md from what `plan` says of each row.

    python -m benchmarks.scaling_table

Everything between the markers in the document is replaced; the rest is text. Nothing is trained.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks.configs import read_config
from lrdint_tune.planning import Plan, plan
from lrdint_tune.planning.options import PlanOptions
from lrdint_tune.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- {}: python -m benchmarks.scaling_table -->", "<!-- end of {} -->"
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """One way to run: a config, how many of which GPU, and overrides as on the command line."""

    model: str
    ranks: int
    gpu: str
    config: str
    overrides: tuple[str, ...] = ()


_1B, _8B, _70B = (f"configs/{name}_dint.yaml" for name in ("llama3_2_1b", "llama3_1_8b", "llama3_1_70b"))
ROWS = {
    "H100": (
        Row("1B", 1, "h100", _1B),
        Row("1B", 8, "h100", _1B),
        Row("1B", 64, "h100", _1B, ("data_parallel_replicate_dim=8",)),
        Row("1B", 512, "h100", _1B, ("data_parallel_replicate_dim=64",)),
        Row("8B", 1, "h100", _8B),
        Row("8B", 8, "h100", _8B),
        Row(
            "8B",
            64,
            "h100",
            _8B,
            ("data_parallel_replicate_dim=8", "batch_size=4", "gradient_accumulation_steps=2"),
        ),
        Row(
            "8B",
            512,
            "h100",
            _8B,
            ("data_parallel_replicate_dim=64", "batch_size=4", "gradient_accumulation_steps=1"),
        ),
        Row(
            "70B, adapter only",
            1,
            "h100",
            _70B,
            (
                "tensor_parallel_dim=1",
                "trainable=[adapter]",
                "quantize_base=nf4",
                "batch_size=1",
                "gradient_accumulation_steps=8",
                "ac_mode=full",
            ),
        ),
        Row("70B", 8, "h100", _70B, ("tensor_parallel_dim=1", "batch_size=2", "ac_mode=full")),
        Row("70B", 64, "h100", _70B),
        Row("70B", 512, "h100", _70B, ("data_parallel_replicate_dim=8",)),
    ),
    "others": (
        Row("1B", 1, "rtx4090", _1B, ("batch_size=4", "gradient_accumulation_steps=2")),
        Row("8B", 8, "a100_40", _8B),
        Row(
            "8B, 131,072 tokens",
            64,
            "h100",
            _8B,
            (
                "max_seq_len=131072",
                "context_parallel_dim=8",
                "batch_size=1",
                "gradient_accumulation_steps=1",
                "ac_mode=full",
            ),
        ),
    ),
}


def read(row: Row) -> TrainConfig:
    """The row's config with its overrides."""
    return read_config(ROOT / row.config, list(row.overrides))


def plan_row(row: Row) -> Plan:
    return plan(read(row), PlanOptions(world_size=row.ranks, gpu=row.gpu).target)


def as_line(row: Row, result: Plan) -> str:
    knobs, timing = result.knobs, result.timing
    assert timing is not None and result.memory_limit is not None
    mesh = f"{knobs.replicate} x {knobs.shard} x {knobs.context} x {knobs.tensor}"
    cells = (
        row.model,
        f"{row.ranks} {row.gpu}",
        " ".join((f"`{row.config}`", *(f"`{override}`" for override in row.overrides))),
        mesh,
        knobs.checkpointing,
        f"{result.memory.total / GIB:.1f} of {result.memory_limit / GIB:.1f}",
        f"{timing.tokens:,}",
        f"{timing.slowest:.2f} to {timing.fastest:.2f}",
        f"{timing.tokens_per_s[1] / row.ranks:,.0f} to {timing.tokens_per_s[0] / row.ranks:,.0f}",
        f"{timing.causal_mfu[1]:.0%} to {timing.causal_mfu[0]:.0%}",
    )
    return "| " + " | ".join(cells) + " |"


TITLES = (
    "model",
    "GPUs",
    "config and overrides",
    "replicate x shard x context x tensor",
    "checkpointing",
    "peak, GiB",
    "tokens a step",
    "s a step",
    "tokens/s a GPU",
    "MFU, causal half",
)


def table(rows: tuple[Row, ...]) -> str:
    lines = ["| " + " | ".join(TITLES) + " |", "|" + "---|" * len(TITLES)]
    return "\n".join([*lines, *(as_line(row, plan_row(row)) for row in rows)])


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    text = DOCUMENT.read_text()
    for name, rows in ROWS.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n\n{table(rows)}\n\n{end}{after}"
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
