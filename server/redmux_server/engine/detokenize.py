"""Turn a stream of token ids into a stream of text, and end it at a stop text."""

from collections.abc import Callable, Sequence

from redmux_server.engine.stop_pattern import StopPattern

_BROKEN = "\ufffd"
_MOST_HELD = 16  # tokens that are held back; a character has at most four
_CHARACTER = 3  # most tokens that a character is held back for: what a fourth would complete


class Detokenizer:
    """Decodes tokens as they come and gives out text once it cannot change any more.

    A token may be part of a character, or change the space before it; so a window of tokens is
    decoded with the newest ones, and what that adds is given out unless it ends inside a character
    (the method of TGI and vLLM). A character that many tokens have not completed will not be: then
    all but the last few bytes are given out as U+FFFD. So the window is short, whatever comes.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the window
        self._num_before = 0  # its first tokens, whose text was given out
        self._before = ""  # that text

    def push(self, token_ids: Sequence[int]) -> str:
        """Returns the text that these tokens complete."""
        self._ids += token_ids
        text = self._decode(self._ids)
        if len(text) > len(self._before) and not text.endswith(_BROKEN):
            return self._give(text)
        if len(self._ids) - self._num_before > _MOST_HELD:
            return self._give_up(text)
        return ""

    def flush(self) -> str:
        """Returns what is left at the end, an incomplete character as U+FFFD."""
        return self._give(self._decode(self._ids))

    def _give(self, text: str) -> str:
        """Gives out the rest of the window's text; the tokens that brought it are the next one."""
        given = text[len(self._before) :]
        del self._ids[: self._num_before]
        self._num_before = len(self._ids)
        self._before = self._decode(self._ids)
        return given

    def _give_up(self, text: str) -> str:
        """Makes the window short again where its tokens complete nothing."""
        if not text.endswith(_BROKEN):  # they have no text
            del self._ids[self._num_before :]
            return ""
        # What may still become a character decodes to one U+FFFD, if it does not share its first
        # token with the character before it.
        lengths = range(_CHARACTER, 0, -1)
        length = next((n for n in lengths if self._decode(self._ids[-n:]) == _BROKEN), _CHARACTER)
        tail = self._decode(self._ids[-length:])
        num_open = int(tail.endswith(_BROKEN))
        given = text[len(self._before) : len(text) - num_open]
        self._ids = self._ids[-length:]
        self._num_before, self._before = 0, tail[: len(tail) - num_open]
        return given


class StopMatcher:
    """Holds text back while it may be the beginning of a stop text."""

    def __init__(
        self,
        stops: Sequence[str],
        pattern: StopPattern | None = None,
        *,
        included: bool = False,
    ) -> None:
        """With `included` the stop text, or match, that ends the text is part of it."""
        self._stops = list(stops)
        self._pattern = pattern
        self._included = included
        self._before = ""  # the last character that was given out
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """Returns the text that is safe to give out; nothing more once `matched` is set.

        Unless it `may_stop`, no stop text ends in this text, but one may begin there.
        """
        if self.matched is not None or not text:
            return ""
        num_held = len(self._held)
        text = self._held + text
        found = self._find(text, num_held) if may_stop else None
        if found is not None:
            start, end = found
            self.matched, self._held = text[start:end], ""
            return text[: end if self._included else start]
        held = max((self._overlap(text, stop) for stop in self._stops), default=0)
        if self._pattern is not None:
            held = max(held, min(len(text), self._pattern.width - 1))
        given, self._held = text[: len(text) - held], text[len(text) - held :]
        self._before = given[-1:] or self._before
        return given

    def _find(self, text: str, num_held: int) -> tuple[int, int] | None:
        """Returns (start, end) of the stop text that is complete first behind the held text.

        So the cut does not depend on how the text arrived. Of two that end together, the longer.
        """
        found = []
        for stop in self._stops:
            start = text.find(stop, max(0, num_held - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start))
        if self._pattern is not None:
            shift = len(self._before)
            match = self._pattern.find(self._before + text, shift, shift + num_held)
            if match is not None:
                found.append((match[1] - shift, match[0] - shift))
        if not found:
            return None
        end, start = min(found)
        return start, end

    def flush(self) -> str:
        """Returns what was held back, at the end of the stream."""
        text, self._held = self._held, ""
        return text

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that is a proper beginning of `stop`."""
        longest = min(len(text), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
