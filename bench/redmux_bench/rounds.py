"""Measurements in turn, round by round, so that a slow minute does not count for one side."""

import statistics
from collections.abc import Callable, Sequence


def in_turn(
    rounds: int, *measurements: Callable[[], float], warm_ups: int = 1
) -> list[list[float]]:
    """Returns the results of each measurement, after rounds of warming up that do not count."""
    results: list[list[float]] = [[] for _ in measurements]
    for index in range(warm_ups + rounds):
        for measure, values in zip(measurements, results, strict=True):
            value = measure()
            if index >= warm_ups:
                values.append(value)
    return results


def rotated(items: Sequence[int], round_index: int) -> list[int]:
    """Returns the items in the order of a round: A B C, then B C A, then C A B.

    Over as many rounds as there are items, each is measured once in every place.
    """
    first = round_index % len(items)
    return [*items[first:], *items[:first]]


def median_ratio(values: Sequence[float], references: Sequence[float]) -> float:
    """Returns the median over the rounds of the ratio within each round.

    Both members of a ratio were measured one after the other, so that a machine which is slower
    in one round than in another does not distort it.
    """
    return statistics.median(v / r for v, r in zip(values, references, strict=True))
