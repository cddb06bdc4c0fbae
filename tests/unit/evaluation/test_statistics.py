"""Standard errors and intervals against simulation and known cases."""

import math

import numpy as np
import pytest

from lrdint_tune.evaluation.statistics import (
    mean_estimate,
    paired_bootstrap,
    paired_over_seeds,
    ratio_estimate,
)


def test_equal_counts_give_the_usual_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=50)
    found = ratio_estimate(values * 7, np.full(50, 7.0))
    assert found.mean == pytest.approx(values.mean())
    assert found.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    assert mean_estimate(values).stderr == pytest.approx(found.stderr)


def test_standard_error_of_a_ratio_is_that_of_repeated_samples() -> None:
    generator = np.random.default_rng(1)

    def sample() -> tuple[np.ndarray, np.ndarray]:
        counts = generator.integers(1, 40, 200).astype(float)
        return counts * (2 + generator.normal(size=200)), counts  # the tokens of a row are alike

    means = [s.sum() / c.sum() for s, c in (sample() for _ in range(2000))]
    assert ratio_estimate(*sample()).stderr == pytest.approx(np.std(means), rel=0.2)


def test_one_row_has_no_standard_error() -> None:
    found = ratio_estimate([3.0], [2.0])
    assert found.mean == 1.5 and math.isnan(found.stderr)
    assert found.as_dict() == {"mean": 1.5, "stderr": None, "n": 1}


@pytest.mark.parametrize("sums, counts", [([], []), ([0.0], [0.0])])
def test_nothing_to_average(sums: list[float], counts: list[float]) -> None:
    with pytest.raises(ValueError, match="no rows"):
        ratio_estimate(sums, counts)


def test_pairing_removes_what_both_runs_share() -> None:
    generator = np.random.default_rng(2)
    hard = generator.normal(0, 5, 300)
    ours, baseline = hard - 0.1 + generator.normal(0, 0.3, 300), hard
    found = paired_bootstrap(ours, baseline)
    assert found.is_beyond_noise and found.low < -0.1 < found.high
    assert found.high - found.low < 0.1
    assert not paired_bootstrap(hard + generator.normal(0, 0.3, 300), hard).is_beyond_noise


def test_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        counts = generator.integers(5, 30, 60).astype(float)
        shift = counts * (0.2 + 0.5 * generator.normal(size=60))
        found = paired_bootstrap(shift, np.zeros(60), counts, resamples=400)
        covered += found.low <= 0.2 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_seeds_that_disagree_widen_the_interval() -> None:
    generator = np.random.default_rng(4)
    documents = generator.normal(0, 0.1, 100)
    baseline, counts = np.zeros((3, 100)), np.ones(100)
    alike = paired_over_seeds(np.stack([documents - 0.2] * 3), baseline, counts)
    shifts = np.array([[-0.6], [-0.1], [0.1]])
    apart = paired_over_seeds(documents + shifts, baseline, counts)
    assert alike.mean == pytest.approx(apart.mean, abs=1e-9)
    assert alike.is_beyond_noise and not apart.is_beyond_noise
    assert paired_over_seeds(baseline[:1] + documents, baseline[:1], counts).n == 100
    with pytest.raises(ValueError, match="no pairs"):
        paired_over_seeds(baseline[:2], baseline, counts)


@pytest.mark.parametrize("seeds, between", [(2, 0.3), (3, 0.3), (3, 0.0)])
def test_interval_over_seeds_covers(seeds: int, between: float) -> None:
    """Also where only the seeds differ: an interval between the seeds' extremes would cover half of the time."""
    generator = np.random.default_rng(5)
    covered = 0
    for _ in range(400):
        truth = generator.normal(0, between, (seeds, 1)) + generator.normal(0, 0.5, (1, 40))
        found = paired_over_seeds(0.7 + truth, np.zeros((seeds, 40)), np.ones(40))
        covered += found.low <= 0.7 <= found.high
    assert covered / 400 >= 0.92


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="equal lengths, not 2, 3 and 2"):
        paired_bootstrap([1, 2], [1, 2, 3])
