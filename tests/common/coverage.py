"""What the method suite has checked, as a table of one line per method."""

from collections.abc import Iterable, Iterator

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


class Coverage:
    """Collects (check, case, heads, layout, backend)."""

    def __init__(self) -> None:
        self.cases: dict[str, MethodCase] = {}
        self.seen: set[tuple[str, str, str, str, str]] = set()

    def add(self, checks: str, case: MethodCase, heads: str, layouts: Iterable[str], backends: Iterable[str]) -> None:
        """`checks`: names of CHECKS, joined by ", "."""
        self.cases[case.name] = case
        for check in checks.split(", "):
            assert check in CHECKS, check
            self.seen |= {(check, case.name, heads, layout, backend) for layout in layouts for backend in backends}

    def table(self) -> Iterator[str]:
        """Counts of different (options, heads, layout, backend) per check."""
        yield (
            f"{'method':9} {'lambda forms':>12} {'options':>7}  {'heads':12} {'layouts':>7}  "
            + "  ".join(CHECKS)
            + "   (cases x heads x layouts x backends)"
        )
        for method in BASE:
            seen = [row for row in self.seen if self.cases[row[1]].method == method]
            if not seen:
                continue
            cases = {row[1] for row in seen}
            forms = {self.cases[name].lam for name in cases} - {None}
            heads = [name for name in ("mha", "gqa", "mqa") if any(row[2] == name for row in seen)]
            layouts = {row[3] for row in seen}
            counts = [sum(row[0] == check for row in seen) for check in CHECKS]
            yield (
                f"{method:9} {len(forms) or '-':>12} {len(cases):7}  {' '.join(heads):12} {len(layouts):7}  "
                + "  ".join(f"{count:{len(check)}}" for check, count in zip(CHECKS, counts, strict=True))
            )
