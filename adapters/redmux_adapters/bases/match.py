"""match_bases: whether an adapter that was made for one base model may edit another."""

import enum
import functools
import re

from redmux.errors import WrongBaseError

from .sketch import NUM_CHARS, Sketch

_FINGERPRINT = re.compile(
    r"(?P<shape>.+-\d+x\d+)-(?P<vectors>[0-9a-f]{16})"
    rf"(-(?P<num_token_ids>\d+)-(?P<sketch>[A-Za-z0-9._]{{{NUM_CHARS}}}))?"
)


class BaseMatch(enum.StrEnum):
    """How the base model that an adapter was made for compares with another."""

    SAME = "same"  # the same weights, in whatever precision
    QUANTIZED = "quantized"  # as near as copies of one model in such quantisations are
    UNVERIFIED = "unverified"  # of a fingerprint that sees vectors only, and those are the same
    OTHER = "other"  # other weights or another vocabulary in modules of the same sizes
    FOREIGN = "foreign"  # another architecture or size


@functools.lru_cache(maxsize=1024)
def match_bases(made_for: str, base: str) -> BaseMatch:
    """Compares two fingerprints, the first an adapter's, the second that of the model at hand."""
    if made_for == base:
        return BaseMatch.SAME
    first, second = _FINGERPRINT.fullmatch(made_for), _FINGERPRINT.fullmatch(base)
    if first is None or second is None or first["shape"] != second["shape"]:
        return BaseMatch.FOREIGN
    have_same_vectors = first["vectors"] == second["vectors"]
    if first["sketch"] is None or second["sketch"] is None:
        return BaseMatch.UNVERIFIED if have_same_vectors else BaseMatch.OTHER
    if first["num_token_ids"] != second["num_token_ids"]:
        return BaseMatch.OTHER
    sketches = Sketch.parse(first["sketch"]), Sketch.parse(second["sketch"])
    if Sketch.agrees(*sketches):
        return BaseMatch.SAME
    if have_same_vectors and Sketch.is_quantization_of(*sketches):
        return BaseMatch.QUANTIZED
    return BaseMatch.OTHER


def without_sketch(fingerprint: str) -> str:
    """Returns the part of a fingerprint that people can tell from another."""
    found = _FINGERPRINT.fullmatch(fingerprint)
    if found is None or found["sketch"] is None:
        return fingerprint
    return fingerprint.removesuffix(f"-{found['sketch']}")


def require_base(made_for: str, base: str, allow_other: bool = False) -> BaseMatch:
    """Returns how an adapter's base compares with the one at hand.

    Raises WrongBaseError, naming both, for another architecture or size, and unless `allow_other`
    for other weights.
    """
    match = match_bases(made_for, base)
    if match is BaseMatch.FOREIGN or (match is BaseMatch.OTHER and not allow_other):
        raise WrongBaseError(
            f"the adapter was made for base {made_for!r}, this base is {base!r}: "
            f"{_difference(made_for, base, match)}; train or convert it for this one"
            + (", or allow other bases (--allow-other-base)" if match is BaseMatch.OTHER else "")
        )
    return match


def _difference(made_for: str, base: str, match: BaseMatch) -> str:
    if match is BaseMatch.FOREIGN:
        return "another architecture or size"
    counts = [
        found["num_token_ids"]
        for text in (made_for, base)
        if (found := _FINGERPRINT.fullmatch(text)) is not None
    ]
    if None not in counts and counts[0] != counts[1]:
        return f"{counts[0]} and {counts[1]} token ids"
    return "the same sizes, but other weights, as fine-tuned relatives have"
