"""Splits are disjoint, complete, fair to every class, and the same every time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sequencer2d.data.splits import stratified_split

labels_of_any_shape = st.lists(st.integers(0, 20), max_size=300).map(lambda values: np.array(values, dtype=np.int64))
fractions = st.floats(0.001, 0.999)
seeds = st.integers(0, 2**32 - 1)


@given(labels=labels_of_any_shape, fraction=fractions, seed=seeds)
def test_split_is_a_fair_partition(labels: np.ndarray, fraction: float, seed: int) -> None:
    first, second = stratified_split(labels, fraction, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate([first, second])), np.arange(len(labels)))
    assert (np.diff(first) > 0).all()
    assert (np.diff(second) > 0).all()
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        held_out = np.count_nonzero(labels[second] == label)
        if count == 1:
            assert held_out == 0
        else:
            assert 1 <= held_out <= count - 1
            assert abs(held_out - count * fraction) < 1


@given(labels=labels_of_any_shape, fraction=fractions, seed=seeds)
def test_same_seed_same_split(labels: np.ndarray, fraction: float, seed: int) -> None:
    once, again = stratified_split(labels, fraction, seed), stratified_split(labels, fraction, seed)
    np.testing.assert_array_equal(once[0], again[0])
    np.testing.assert_array_equal(once[1], again[1])


@given(seed=st.integers(0, 2**32 - 2))
def test_other_seed_other_split(seed: int) -> None:
    labels = np.arange(1000) % 10
    assert not np.array_equal(stratified_split(labels, 0.5, seed)[1], stratified_split(labels, 0.5, seed + 1)[1])


def test_split_is_the_same_on_every_machine() -> None:
    """Written down once: a run that is repeated elsewhere must validate on the same images."""
    labels = np.arange(24) % 3
    _, second = stratified_split(labels, 0.25, seed=7)
    assert second.tolist() == [5, 6, 10, 11, 15, 16]


def test_more_classes_than_held_out_samples() -> None:
    """200 classes of 2: a tenth of 400 is 40, but every class is in both parts."""
    labels = np.arange(400) % 200
    first, second = stratified_split(labels, 0.1, seed=0)
    assert sorted(labels[first]) == sorted(labels[second]) == list(range(200))


def test_order_of_the_files_does_not_decide() -> None:
    """Within a class, the second part is drawn from everywhere, not from the end or the start."""
    _, second = stratified_split(np.zeros(1000, dtype=np.int64), 0.5, seed=0)
    assert 400 < second.mean() < 600
    assert (np.diff(second) == 1).mean() < 0.9


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"fraction={fraction}"):
        stratified_split(np.zeros(4, dtype=np.int64), fraction, seed=0)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed={seed}"):
        stratified_split(np.zeros(4, dtype=np.int64), 0.5, seed=seed)
