"""Correlations by which the best vectors can be chosen, as GLUE has them for CoLA and STS-B."""

import math
from collections.abc import Sequence


def pearson(predicted: Sequence[float], right: Sequence[float]) -> float:
    """Returns Pearson's correlation, 0 where one side is constant."""
    count = len(right)
    mean_p, mean_r = sum(predicted) / count, sum(right) / count
    pairs = [(p - mean_p, r - mean_r) for p, r in zip(predicted, right, strict=True)]
    return _ratio(
        sum(p * r for p, r in pairs), sum(p * p for p, _ in pairs), sum(r * r for _, r in pairs)
    )


def matthews(predicted: Sequence[float], right: Sequence[float]) -> float:
    """Returns Matthews' correlation of classes, of two or more, 0 where one side is constant.

    Of more than two classes it is Gorodkin's R_K (2004).
    """
    classes = {*predicted, *right}
    total = len(right)
    num_right = sum(p == r for p, r in zip(predicted, right, strict=True))
    counts = [(list(predicted).count(c), list(right).count(c)) for c in classes]
    return _ratio(
        num_right * total - sum(p * r for p, r in counts),
        total**2 - sum(p * p for p, _ in counts),
        total**2 - sum(r * r for _, r in counts),
    )


def _ratio(covariance: float, variance: float, other: float) -> float:
    return covariance / math.sqrt(variance * other) if variance > 0 and other > 0 else 0.0
