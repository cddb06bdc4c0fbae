"""What the method suite has checked, as a table of one line per method."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tests.common.cases import BASE, MethodCase

CHECKS = (
    "reference",
    "gradients",
    "identity",
    "not the identity",
    "alive",
    "causality",
    "packing",
    "decoding",
)


class Row(NamedTuple):
    """One thing that was checked; ``case`` is the name of the method and its options."""

    check: str
    method: str
    lam: str | None
    case: str
    heads: str
    layout: str
    backend: str


class Coverage:
    """Collects rows."""

    def __init__(self) -> None:
        self.seen: set[Row] = set()

    def add(self, checks: str, case: MethodCase, heads: str, layouts: Iterable[str], backends: Iterable[str]) -> None:
        """`checks`: names of CHECKS, joined by ", "."""
        for check in checks.split(", "):
            assert check in CHECKS, check
            what = (check, case.method, case.lam, case.name, heads)
            self.seen |= {Row(*what, layout, backend) for layout in layouts for backend in backends}

    def table(self) -> Iterator[str]:
        """Counts of different (options, heads, layout, backend) per check."""
        yield (
            f"{'method':9} {'lambda forms':>12} {'options':>7}  {'heads':12} {'layouts':>7}  "
            + "  ".join(CHECKS)
            + "   (cases x heads x layouts x backends)"
        )
        for method in BASE:
            seen = [row for row in self.seen if row.method == method]
            if not seen:
                continue
            cases = {row.case for row in seen}
            forms = {row.lam for row in seen} - {None}
            heads = [name for name in ("mha", "gqa", "mqa") if any(row.heads == name for row in seen)]
            layouts = {row.layout for row in seen}
            counts = [sum(row.check == check for row in seen) for check in CHECKS]
            yield (
                f"{method:9} {len(forms) or '-':>12} {len(cases):7}  {' '.join(heads):12} {len(layouts):7}  "
                + "  ".join(f"{count:{len(check)}}" for check, count in zip(CHECKS, counts, strict=True))
            )
