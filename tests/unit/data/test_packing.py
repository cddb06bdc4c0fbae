"""The plan of an epoch: complete, within the limit, deterministic, and well filled."""

import numpy as np
import pytest

from lrdint_tune.training.data import pack_plan
from lrdint_tune.training.data.packing import PackPlan


def plan(lengths: list[int] | np.ndarray, limit: int = 16, **options: object) -> PackPlan:
    return pack_plan(lengths, limit, **{"seed": 0, "epoch": 0, "shuffle": True, "packed": True, **options})  # type: ignore[arg-type]


def packs(planned: PackPlan) -> list[list[int]]:
    return [planned[i].tolist() for i in range(len(planned))]


@pytest.fixture
def lengths() -> np.ndarray:
    return np.random.default_rng(1).integers(1, 17, size=3000)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_is_in_exactly_one_pack_within_the_limit(lengths: np.ndarray, packed: bool, shuffle: bool) -> None:
    planned = plan(lengths, packed=packed, shuffle=shuffle)
    rows = [row for pack in packs(planned) for row in pack]
    assert sorted(rows) == list(range(len(lengths)))
    assert all(0 < lengths[pack].sum() <= 16 for pack in packs(planned))
    assert (rows == list(range(len(lengths)))) == (not shuffle and not packed)


def test_by_hand() -> None:
    # 10 opens a pack; 7 a second; 6 fits the first exactly (room 6) rather than the second (room 9); 9 fills that one.
    assert packs(plan([10, 7, 6, 9, 1], shuffle=False)) == [[0, 2], [1, 3], [4]]


def test_unpacked_keeps_one_row_per_pack() -> None:
    assert packs(plan([3, 1, 2], packed=False, shuffle=False)) == [[0], [1], [2]]


@pytest.mark.parametrize("packed", [True, False])
def test_same_arguments_same_plan_and_seed_and_epoch_matter(lengths: np.ndarray, packed: bool) -> None:
    base = plan(lengths, packed=packed)
    assert packs(base) == packs(plan(lengths, packed=packed))
    assert base.checksum() == plan(lengths, packed=packed).checksum()
    for change in ({"seed": 1}, {"epoch": 1}):
        other = plan(lengths, packed=packed, **change)
        assert packs(base) != packs(other) and base.checksum() != other.checksum()


def test_epochs_have_the_same_packs_in_another_order(lengths: np.ndarray) -> None:
    """So that all epochs have equally many steps."""
    first, second = packs(plan(lengths)), packs(plan(lengths, epoch=5))
    assert sorted(first) == sorted(second)


def test_without_shuffling_all_epochs_are_alike(lengths: np.ndarray) -> None:
    assert packs(plan(lengths, shuffle=False)) == packs(plan(lengths, shuffle=False, epoch=3, seed=9))


def test_packs_are_nearly_full(lengths: np.ndarray) -> None:
    assert lengths.sum() / (16 * len(plan(lengths))) > 0.98


def test_the_plan_does_not_change_between_releases() -> None:
    """A checkpoint's position means these packs: a change here breaks the resuming of runs that exist."""
    assert packs(plan([5, 9, 3, 8, 8, 2, 7, 16], epoch=2, seed=7)) == [[1], [7], [0, 6, 2], [4, 5], [3]]


def test_a_million_rows_take_seconds() -> None:
    planned = plan(np.random.default_rng(0).integers(50, 800, size=1_000_000), 2048)
    assert len(planned.rows) == 1_000_000


@pytest.mark.parametrize("bad", [0, 17])
def test_impossible_lengths(bad: int) -> None:
    with pytest.raises(ValueError, match=r"row lengths must be in 1\.\.16"):
        plan([4, bad])
