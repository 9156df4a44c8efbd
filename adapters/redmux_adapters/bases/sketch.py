"""Sketch: the weights of a base model in 76 characters, to be compared rather than to be equal."""

import base64
import math
from typing import NamedTuple

NUM_COORDINATES = 24
NUM_CHARS = 76
_BITS = 12  # of a coordinate; one more than of the share of repeats
_STEPS = 512  # of a coordinate in 1; the largest is 4
_REPEAT_STEPS = 4096
_DIGEST_BITS = 26
_NUM_DIGESTS = 3
# Values in bf16 repeat up to 0.0015, those of Q8_0 from 0.0036 on.
QUANTIZED = 0.0025
# Of estimates that scatter by a seventh, since there are 24 coordinates.
_LEAST, _MOST = 0.6, 1.6


class Digests(NamedTuple):
    """The first 26 bits of digests of some values: as they are, and rounded to bf16 and to fp16."""

    fp32: int
    bf16: int
    fp16: int

    @classmethod
    def of(cls, *digests: bytes) -> "Digests":
        """Returns the beginnings of three digests."""
        return cls(*(int.from_bytes(digest[:4], "big") >> 32 - _DIGEST_BITS for digest in digests))

    def agreeing(self, other: "Digests") -> set[str]:
        """Returns the precisions in which the values are equal.

        bf16 is none of them where the values are equal as they are: a copy in bf16 would differ.
        Of one in fp16 only the smallest values do, so that some matrices may be equal.
        """
        if self.fp32 == other.fp32:
            return {"fp32", "fp16"}
        return {kind for kind in ("bf16", "fp16") if getattr(self, kind) == getattr(other, kind)}


class Sketch(NamedTuple):
    """What `fingerprint` keeps of a model's weights.

    `repeats` estimates the relative error of the rounding that the matrices have been through, and
    the root mean square difference of two models' `projections` how far their matrices are apart.
    """

    embedding: Digests
    others: Digests  # of all vectors and of the matrices other than the embedding
    embedding_is_quantized: bool
    repeats: float
    projections: tuple[float, ...]

    def text(self) -> str:
        """Returns the sketch as 76 of A-Z a-z 0-9 . _"""
        number = 0
        for digest in (*self.embedding, *self.others):
            number = number << _DIGEST_BITS | digest
        shifted = [value * _STEPS + 2 ** (_BITS - 1) for value in self.projections]
        number = number << 1 | self.embedding_is_quantized
        number = number << _BITS - 1 | _whole(self.repeats * _REPEAT_STEPS, _BITS - 1)
        for value in shifted:
            number = number << _BITS | _whole(value, _BITS)
        return base64.b64encode(number.to_bytes(NUM_CHARS * 6 // 8, "big"), b"._").decode()

    @classmethod
    def parse(cls, text: str) -> "Sketch":
        """Returns the sketch that has this text."""
        number = int.from_bytes(base64.b64decode(text, b"._"), "big")

        def take(count: int, bits: int) -> list[int]:
            nonlocal number
            values = [number >> bits * index & 2**bits - 1 for index in range(count)]
            number >>= bits * count
            return values[::-1]

        coordinates = take(NUM_COORDINATES, _BITS)
        (repeats,), (is_quantized,) = take(1, _BITS - 1), take(1, 1)
        others, embedding = (Digests(*take(_NUM_DIGESTS, _DIGEST_BITS)) for _ in range(2))
        projections = tuple((value - 2 ** (_BITS - 1)) / _STEPS for value in coordinates)
        return cls(embedding, others, bool(is_quantized), repeats / _REPEAT_STEPS, projections)

    def agrees(self, other: "Sketch") -> bool:
        """Whether all values are equal, or all become so in bf16 or in fp16."""
        return bool(self.embedding.agreeing(other.embedding) & self.others.agreeing(other.others))

    def is_quantization_of(self, other: "Sketch") -> bool:
        """Whether quantising explains how far two that do not agree are apart, and nothing less.

        What was quantised in one copy only is as far from the other as its rounding went. What was
        fine-tuned from quantised weights is nearer to them; if it shares the quantised embedding,
        as it does where a LoRA was merged into it, no other file of the model is what it is.
        """
        coarsest = max(self.repeats, other.repeats)
        shares_embedding = bool(self.embedding.agreeing(other.embedding))
        if coarsest < QUANTIZED or (shares_embedding and self.embedding_is_quantized):
            return False
        between = math.sqrt(abs(self.repeats**2 - other.repeats**2))
        least = _LEAST * between - 0.1 * coarsest
        most = _MOST * math.hypot(self.repeats, other.repeats)
        return least <= self.distance(other) <= most

    def distance(self, other: "Sketch") -> float:
        """Estimates the root mean square difference of the matrices, relative to their size."""
        differences = [a - b for a, b in zip(self.projections, other.projections, strict=True)]
        return math.sqrt(sum(d * d for d in differences) / NUM_COORDINATES)


def _whole(value: float, bits: int) -> int:
    return int(min(max(round(value), 0), 2**bits - 1))
