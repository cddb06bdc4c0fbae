"""How sure a measured number is: standard errors, and paired bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 10_000
_BLOCK = 2**22  # resampled numbers held at a time


@dataclass(frozen=True)
class Estimate:
    """A mean over independent units (rows, items, seeds).

    Attributes:
        mean: their (weighted) mean.
        stderr: its standard error; NaN for one unit.
        n: how many units.
    """

    mean: float
    stderr: float
    n: int

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON, which has no NaN: null instead."""
        return {key: value if math.isfinite(value) else None for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Difference:
    """A paired difference of two runs on the same units.

    Attributes:
        mean: ours minus the baseline's.
        low, high: the 95 % percentile-bootstrap interval over units.
        n: how many units.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def is_beyond_noise(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Mean of independent values, with the sample's standard error.

    Raises:
        ValueError: there is no value.
    """
    return ratio_estimate(values, np.ones(len(values)))


def ratio_estimate(sums: Sequence[float] | np.ndarray, counts: Sequence[float] | np.ndarray) -> Estimate:
    """``sum(sums) / sum(counts)`` over independent rows, such as NLL per token from each row's NLL and tokens.

    The tokens of a row are not independent, so the standard error is that of a ratio of sums over rows:
    ``sqrt(n / (n - 1) * sum((sums - mean * counts)^2)) / sum(counts)``. With equal counts it is the usual one.

    Raises:
        ValueError: no rows, or none that counts.
    """
    s, c = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    if not len(s) or c.sum() <= 0:
        raise ValueError("no rows to average over")
    mean = s.sum() / c.sum()
    n = len(s)
    stderr = math.sqrt(n / (n - 1) * ((s - mean * c) ** 2).sum()) / c.sum() if n > 1 else math.nan
    return Estimate(float(mean), float(stderr), n)


def paired_bootstrap(
    ours: Sequence[float] | np.ndarray,
    baseline: Sequence[float] | np.ndarray,
    counts: Sequence[float] | np.ndarray | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """``sum(ours - baseline) / sum(counts)`` with its 95 % interval: units are drawn with replacement, both runs'
    values of a unit together.

    Args:
        ours, baseline: one value per unit, in the same order.
        counts: weight of each unit (its tokens, where the values are sums); None: 1.
        seed: of the draws.
        resamples: how many.

    Raises:
        ValueError: lengths differ, or there are no units.
    """
    a, b = np.asarray(ours, np.float64), np.asarray(baseline, np.float64)
    c = np.ones(len(a)) if counts is None else np.asarray(counts, np.float64)
    if not len(a) == len(b) == len(c):
        raise ValueError(f"paired values must have equal lengths, not {len(a)}, {len(b)} and {len(c)}")
    if not len(a) or c.sum() <= 0:
        raise ValueError("no units to draw from")
    difference = a - b
    generator = np.random.default_rng(seed)
    n, means = len(a), []
    block = max(1, _BLOCK // n)
    for begin in range(0, resamples, block):
        drawn = generator.integers(0, n, (min(block, resamples - begin), n))
        means.append(difference[drawn].sum(1) / c[drawn].sum(1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Difference(float(difference.sum() / c.sum()), float(low), float(high), n)


def paired_bootstrap_over_seeds(
    ours: np.ndarray, baseline: np.ndarray, counts: np.ndarray, *, seed: int = 0, resamples: int = 2_000
) -> Difference:
    """As :func:`paired_bootstrap` for several training seeds: seeds are drawn first, then units, so the interval holds
    both kinds of chance. Few seeds make it coarse; with one it is the plain one.

    Args:
        ours, baseline: ``[seeds, units]``, a row of both with the same training seed.
        counts: ``[units]``.

    Raises:
        ValueError: shapes differ, or there are no units.
    """
    if ours.shape != baseline.shape or ours.shape[1:] != counts.shape or not ours.size or counts.sum() <= 0:
        raise ValueError(f"no pairs: {ours.shape}, {baseline.shape} and {counts.shape}")
    difference = ours - baseline
    generator = np.random.default_rng(seed)
    seeds, n = difference.shape
    means = np.empty(resamples)
    for i in range(resamples):
        rows, units = generator.integers(0, seeds, seeds), generator.integers(0, n, n)
        means[i] = difference[np.ix_(rows, units)].sum() / (seeds * counts[units].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(float(difference.sum() / (seeds * counts.sum())), float(low), float(high), n)
