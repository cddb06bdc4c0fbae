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


def paired_over_seeds(ours: np.ndarray, baseline: np.ndarray, counts: np.ndarray) -> Difference:
    """``ours - baseline`` per token for several training seeds on the same documents, with a 95 % interval that holds
    both kinds of chance.

    Its half width is ``sqrt((1.96 se_documents)^2 + (t se_seeds)^2)``: the standard error over documents of the
    difference averaged over seeds, and that of the seeds' mean differences with Student's t, since they are few. With
    one seed it says nothing about another one.

    Args:
        ours, baseline: sums ``[seeds, documents]``, a row of both with the same training seed.
        counts: tokens of each document.

    Raises:
        ValueError: shapes differ, or there are no documents.
    """
    if ours.shape != baseline.shape or ours.shape[1:] != counts.shape or not ours.size or counts.sum() <= 0:
        raise ValueError(f"no pairs: {ours.shape}, {baseline.shape} and {counts.shape}")
    difference = ours - baseline
    documents = ratio_estimate(difference.mean(0), counts)
    by_documents = 1.96 * documents.stderr if documents.n > 1 else math.inf
    half = math.hypot(by_documents, half_width_over_seeds(difference.sum(1) / counts.sum()))
    return Difference(documents.mean, documents.mean - half, documents.mean + half, documents.n)


def half_width_over_seeds(means: np.ndarray) -> float:
    """Of the 95 % interval of the mean of a few independent values (Student's t); 0 for one, which cannot say."""
    n = len(means)
    return float(student_t(n - 1) * means.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0


def student_t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t; beyond 9 degrees of freedom that of 9, which is a little wide."""
    return _T[min(degrees, len(_T)) - 1]


_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
