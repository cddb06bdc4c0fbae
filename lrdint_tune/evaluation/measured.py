"""What a task finds out: a value per item, from which estimates and paired differences follow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lrdint_tune.evaluation.statistics import Estimate, mean_estimate, ratio_estimate


@dataclass(frozen=True)
class Values:
    """One metric, item by item.

    Attributes:
        values: of each item; sums, where there are counts.
        counts: what each sum is over (tokens, words), or None: the metric is the mean of the values.
    """

    values: Sequence[float]
    counts: Sequence[float] | None = None

    def estimate(self) -> Estimate:
        """The metric over all items, with its standard error over items."""
        return mean_estimate(self.values) if self.counts is None else ratio_estimate(self.values, self.counts)

    def as_dict(self) -> dict[str, Any]:
        counts = None if self.counts is None else [float(c) for c in self.counts]
        return {"values": [float(v) for v in self.values], "counts": counts}


@dataclass(frozen=True)
class Measured:
    """The outcome of one task.

    Attributes:
        items: metrics with their values, which pair with those of another run.
        derived: metrics that follow from those (a perplexity), and do not pair.
        details: anything else, for JSON.
    """

    items: Mapping[str, Values]
    derived: Mapping[str, Estimate] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        estimates = {name: values.estimate() for name, values in self.items.items()} | dict(self.derived)
        return {
            "metrics": {name: estimate.as_dict() for name, estimate in estimates.items()},
            "items": {name: values.as_dict() for name, values in self.items.items()},
            **self.details,
        }


def perplexity(nll: Estimate) -> Estimate:
    """``exp(nll)``, its standard error by the delta method: ``exp(nll)`` times that of the NLL."""
    value = math.exp(nll.mean)
    return Estimate(value, value * nll.stderr, nll.n)
