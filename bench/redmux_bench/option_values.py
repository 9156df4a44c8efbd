"""What the options of `redmux bench` take: each function turns a text into a value, or refuses."""

import argparse
import math
from pathlib import Path

from redmux_bench.workload import Lengths


def count(text: str) -> int:
    """Returns a whole number of 0 or more."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 0 or more")
    return int(text)


def positive(text: str) -> int:
    """Returns a whole number of 1 or more."""
    value = count(text)
    if not value:
        raise argparse.ArgumentTypeError("0 is too small, must be at least 1")
    return value


def positive_list(text: str) -> list[int]:
    """Returns the numbers, each 1 or more, of "N,N,..."."""
    return [positive(part) for part in text.split(",")]


def positive_float(text: str) -> float:
    """Returns a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value


def positive_floats(text: str) -> list[float]:
    """Returns the numbers, each finite and above 0, of "R,R,..."."""
    return [positive_float(part) for part in text.split(",")]


def file(text: str) -> str:
    """Returns the path of a file in a folder that exists: nobody measures an hour for nothing."""
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder for {text!r}")
    return text


def named_path(text: str) -> tuple[str, str]:
    """Returns the name and the path of "NAME=PATH"."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def lengths(text: str) -> Lengths:
    """Returns the lengths of "N" or of "A:B"."""
    low, colon, high = text.partition(":")
    lengths = Lengths(positive(low), positive(high if colon else low))
    if lengths.low > lengths.high:
        raise argparse.ArgumentTypeError(f"the range {text} is empty; write A:B with A <= B")
    return lengths


def sweep_counts(text: str) -> list[int]:
    """Returns the different numbers of "K,K,...", 0 among them."""
    counts = [count(part) for part in text.split(",")]
    if 0 not in counts or len(set(counts)) < len(counts):
        raise argparse.ArgumentTypeError(
            f"{text!r} must name each number once, and 0, which the others are compared with"
        )
    return counts


def precisions(text: str) -> list[str]:
    """Returns the precisions of products of "P,P,..."."""
    names = text.split(",")
    for name in names:
        if name not in ("fp32", "int8", "int4", "bf16"):
            raise argparse.ArgumentTypeError(f"{name!r} is none of fp32, int8, int4 and bf16")
    return names


def points(text: str) -> list[tuple[int, int]]:
    """Returns the (batch, context) pairs of "B:C,B:C"."""
    points = []
    for part in text.split(","):
        batch, _, context = part.partition(":")
        points.append((positive(batch), positive(context)))
    return points
