"""GLUE's metrics, in percent."""

from collections.abc import Sequence

import numpy as np


def score(metric: str, predicted: Sequence[float], right: Sequence[float]) -> float:
    """Returns a metric of predictions against what is right; class 1 is the positive one."""
    p, r = np.asarray(predicted, dtype=float), np.asarray(right, dtype=float)
    match metric:
        case "accuracy":
            value = float(np.mean(p == r))
        case "f1":
            both = np.sum((p == 1) & (r == 1))
            value = float(2 * both / max(1, np.sum(p == 1) + np.sum(r == 1)))
        case "matthews" | "pearson":  # of two classes Matthews' is Pearson's correlation
            value = _correlation(p, r)
        case "spearman":
            value = _correlation(_ranks(p), _ranks(r))
        case _:
            raise ValueError(f"no metric {metric!r}")
    return 100 * value


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Returns Pearson's correlation, 0 where one side is constant."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(np.corrcoef(one, other)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Returns each value's rank; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[places]
