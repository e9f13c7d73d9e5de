"""Splitting a data set in two, class by class."""

import numpy as np
from jaxtyping import Int, Int64


def stratified_split(
    labels: Int[np.ndarray, "N"], fraction: float, seed: int
) -> tuple[Int64[np.ndarray, "M"], Int64[np.ndarray, "K"]]:
    """Splits the indices of `labels` so that every class is divided in the same proportion.

    Of a class with `n` samples, the second part gets `n · fraction`, rounded, but at least one and at most `n - 1`; a
    class with a single sample stays in the first part. With many small classes the second part may thus be larger than
    `fraction` of the whole, where scikit-learn's `train_test_split(stratify=…)` gives up.

    Args:
        labels: Class of each sample.
        fraction: Share of the second part, in (0, 1).
        seed: 0 to 2³² - 1. The same labels, fraction and seed give the same split on every machine.

    Returns:
        Indices of the two parts, each in ascending order. They are disjoint and together complete.

    Raises:
        ValueError: `fraction` or `seed` is out of range.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction} of a split must lie between 0 and 1")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must lie between 0 and 2**32 - 1")
    if not len(labels):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)

    by_class = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[by_class])) + 1
    random = np.random.RandomState(seed)  # NumPy keeps its stream for ever; that of `default_rng` may change
    in_second = np.zeros(len(labels), dtype=bool)
    for members in np.split(by_class, starts):
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        in_second[random.permutation(members)[:count]] = True
    return np.flatnonzero(~in_second), np.flatnonzero(in_second)
