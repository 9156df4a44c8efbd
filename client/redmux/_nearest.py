"""nearest: which of some known words a mistyped one was probably meant to be."""

import heapq
from collections.abc import Iterable

_MOST_CHARS = 200
_LEAST_LIKENESS = 0.5


def nearest(word: str, known: Iterable[str], num: int = 1) -> list[str]:
    """Returns up to `num` of the known words, the most alike first, none that is not alike.

    Words are as alike as they share pairs of neighbouring letters (Dice's coefficient). That takes
    time in proportion to the letters of all words whatever they are, where difflib takes that of
    their square. A word of more than 200 letters is like none.
    """
    if len(word) > _MOST_CHARS:
        return []
    pairs = _pairs(word)
    rated = [(_likeness(pairs, other), other) for other in known if len(other) <= _MOST_CHARS]
    return [other for likeness, other in heapq.nlargest(num, rated) if likeness >= _LEAST_LIKENESS]


def _likeness(pairs: set[tuple[str, str]], other: str) -> float:
    others = _pairs(other)
    return 2 * len(pairs & others) / (len(pairs) + len(others))


def _pairs(word: str) -> set[tuple[str, str]]:
    """Returns the pairs of neighbours, with the ends as letters of their own."""
    return set(zip(f"^{word}", f"{word}$", strict=True))
