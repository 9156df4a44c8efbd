"""ROUGE-L of texts with several references, as the COCO caption evaluation computes it."""

import statistics
from collections.abc import Sequence

_BETA = 1.2  # weighs recall over precision


def rouge_l(words: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """Returns the mean over texts of F of the best precision and the best recall, 0 to 1.

    Each is the longest common subsequence over the length of the text, or of the reference, and
    the best ones may come from different references.
    """
    return statistics.fmean(_f(text, texts) for text, texts in zip(words, references, strict=True))


def _f(text: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    common = [_longest_common(text, reference) for reference in references]
    best = max(common)
    if not best:
        return 0.0
    precision = best / len(text)
    recall = max(
        shared / len(reference)
        for shared, reference in zip(common, references, strict=True)
        if reference
    )
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Returns the length of the longest subsequence that both have."""
    row = [0] * (len(b) + 1)
    for item in a:
        above_left = 0
        for i, other in enumerate(b, 1):
            above = row[i]
            row[i] = above_left + 1 if item == other else max(above, row[i - 1])
            above_left = above
    return row[-1]
