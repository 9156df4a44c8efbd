"""NIST and CIDEr of texts with several references.

NLTK's NIST takes the best reference for each order instead of all of them together, which is not
what mteval does; CIDEr is in no package that is kept and works without Java.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Tokens: TypeAlias = Sequence[str]
Weights: TypeAlias = Mapping[tuple[str, ...], float]

_NIST_ORDERS = range(1, 6)
_NIST_BETA = math.log(0.5) / math.log(1.5) ** 2  # a text of 2/3 of the length counts half
_CIDER_ORDERS = range(1, 5)
_CIDER_SIGMA = 6.0


def nist(texts: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Returns NIST (Doddington 2002) over n-grams of 1 to 5 tokens, as mteval-v13a.

    An n-gram counts as often as in that reference of its text which has it most often, and weighs
    log2(count of its first n - 1 tokens / its count) over all references of all texts. Lengths
    compare with the mean over the references of each text.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for reference in (reference for group in references for reference in group):
        counts[()] += len(reference)
        for n in _NIST_ORDERS:
            counts.update(_ngrams(reference, n))
    total = 0.0
    for n in _NIST_ORDERS:
        information = 0.0
        for text, group in zip(texts, references, strict=True):
            shared = _ngrams(text, n) & _most([_ngrams(reference, n) for reference in group])
            information += sum(
                hits * math.log2(counts[ngram[:-1]] / counts[ngram])
                for ngram, hits in shared.items()
            )
        possible = sum(max(len(text) - n + 1, 0) for text in texts)
        total += information / possible if possible else 0.0
    mean_length = sum(statistics.fmean(map(len, group)) for group in references)
    ratio = sum(map(len, texts)) / mean_length
    if ratio == 0:
        return 0.0
    return total * math.exp(_NIST_BETA * math.log(min(ratio, 1.0)) ** 2)


def cider(texts: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Returns CIDEr-D (Vedantam et al. 2015), as COCO caption evaluation, 0 to 10.

    Ten times the mean cosine of tf-idf vectors of n-grams of 1 to 4 words, clipped at the
    reference's weight and damped by the difference in length. An n-gram that the references of
    every text have weighs nothing, so a single text always scores 0.
    """
    frequency: Counter[tuple[str, ...]] = Counter()  # of texts whose references have the n-gram
    for group in references:
        frequency.update(
            {ngram for text in group for n in _CIDER_ORDERS for ngram in _ngrams(text, n)}
        )
    log_texts = math.log(len(references))

    def vectors(text: Tokens) -> list[dict[tuple[str, ...], float]]:
        return [
            {
                ngram: count * (log_texts - math.log(max(1, frequency[ngram])))
                for ngram, count in _ngrams(text, n).items()
            }
            for n in _CIDER_ORDERS
        ]

    def mean_similarity(text: Tokens, group: Sequence[Tokens]) -> float:
        of_text = vectors(text)
        return statistics.fmean(
            statistics.fmean(map(_clipped_cosine, of_text, vectors(reference)))
            * math.exp(-((len(text) - len(reference)) ** 2) / (2 * _CIDER_SIGMA**2))
            for reference in group
        )

    return 10 * statistics.fmean(map(mean_similarity, texts, references))


def _clipped_cosine(text: Weights, reference: Weights) -> float:
    norm = math.hypot(*text.values()) * math.hypot(*reference.values())
    if not norm:
        return 0.0
    shared = text.keys() & reference.keys()
    return sum(min(text[ngram], reference[ngram]) * reference[ngram] for ngram in shared) / norm


def _ngrams(tokens: Tokens, n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def _most(counters: Sequence[Counter[tuple[str, ...]]]) -> Counter[tuple[str, ...]]:
    merged: Counter[tuple[str, ...]] = Counter()
    for counter in counters:
        merged |= counter
    return merged
