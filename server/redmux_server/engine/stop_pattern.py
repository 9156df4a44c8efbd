"""StopPattern: a regular expression that ends a text, found while the text comes in pieces."""

import importlib
import re
from typing import Any

import re2

from redmux.errors import InvalidArgumentError

MAX_PATTERN_BYTES = 512
MAX_MATCH = 128  # characters
_MEMORY = 1 << 20  # bytes for a pattern's automaton, which RE2 bounds
_MAX_PROGRAM = 4096  # instructions of RE2
# What looks at the next character, which has not come: $, \b, \B, \z outside of a class. Escapes
# and classes are taken as a whole, so that what is inside them is nothing of the kind.
_LOOKS_AHEAD = re.compile(r"(?P<ahead>\$|\\[bBz])|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


class StopPattern:
    """A pattern in RE2's syntax, which matches in time linear in the text.

    A text ends at the first position where some match of at most `width` characters ends; of those
    that end there, with the longest.
    """

    def __init__(self, source: str) -> None:
        """Raises InvalidArgumentError for what is no pattern, or none that can be used."""
        num_bytes = len(source.encode(errors="surrogatepass"))
        if num_bytes > MAX_PATTERN_BYTES:
            raise InvalidArgumentError(
                f"stop_regex has {num_bytes} bytes; limit {MAX_PATTERN_BYTES}"
            )
        for found in _LOOKS_AHEAD.finditer(source):
            if found["ahead"]:
                raise InvalidArgumentError(
                    f"stop_regex has {found['ahead']} at {found.start()}, which looks at what "
                    "comes next; leave it out, the completion ends once the pattern has matched"
                )
        bare = _compile(source)
        if bare.search("") is not None:
            raise InvalidArgumentError(
                "stop_regex matches an empty text; it has to match something"
            )
        self._bare = bare
        self._at_end = _compile(f"(?s:.*?)({source})")
        self.width = min(MAX_MATCH, _width(source))

    def find(self, text: str, begin: int, after: int) -> tuple[int, int] | None:
        """Returns where the first match starts and ends that ends behind `after`.

        It starts at `begin` or later. What is before may be looked at: for ^, which is the
        beginning of the text, and of a line with (?m).
        """
        if self._bare.search(text, begin) is None:
            return None
        for end in range(after + 1, len(text) + 1):
            found = self._at_end.fullmatch(text, max(begin, end - self.width), end)
            if found is not None:
                return found.start(1), end
        return None


def _compile(source: str) -> Any:
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MEMORY
    try:
        compiled = re2.compile(source, options)
    except (re2.error, UnicodeError) as err:
        told = err.args[0].decode(errors="replace") if isinstance(err, re2.error) else str(err)
        raise InvalidArgumentError(f"stop_regex is no pattern of RE2: {told}") from None
    if compiled.programsize > _MAX_PROGRAM:
        raise InvalidArgumentError(
            f"stop_regex comes to {compiled.programsize} instructions; limit {_MAX_PROGRAM}"
        )
    return compiled


def _width(source: str) -> int:
    """Returns the most characters that a match has, or more where that is not known.

    Python's parser tells for what both syntaxes have; {,n} is a repetition in Python's alone.
    """
    if "{," in source:
        return MAX_MATCH
    try:
        longest: int = importlib.import_module("re._parser").parse(source).getwidth()[1]
    except (re.error, OverflowError, RecursionError):
        return MAX_MATCH
    return longest
