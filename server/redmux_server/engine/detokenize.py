"""Turn a stream of token ids into a stream of text, and end it at a stop text."""

from collections.abc import Callable, Sequence


class Detokenizer:
    """Decodes tokens as they come and gives out text once it cannot change any more.

    A token may be part of a character, or change the space before it; so a window of tokens is
    decoded twice, without and with the newest ones, and the difference is given out unless it
    ends inside a character (the method of TGI and vLLM).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # first token of the window
        self._given = 0  # tokens whose text was given out

    def push(self, token_ids: Sequence[int]) -> str:
        """Returns the text that these tokens complete."""
        self._ids += token_ids
        before = self._decode(self._ids[self._start : self._given])
        after = self._decode(self._ids[self._start :])
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return ""
        self._start, self._given = self._given, len(self._ids)
        return after[len(before) :]

    def flush(self) -> str:
        """Returns what is left at the end, an incomplete character as U+FFFD."""
        before = self._decode(self._ids[self._start : self._given])
        after = self._decode(self._ids[self._start :])
        self._start = self._given = len(self._ids)
        return after[len(before) :]


class StopMatcher:
    """Holds text back while it may be the beginning of a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Returns the text that is safe to give out; nothing more once `matched` is set."""
        if self.matched is not None:
            return ""
        text = self._held + text
        # The stop text that is complete first wins, so that the cut does not depend on how the
        # text arrived; of two that end together, the longer.
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops
                 if stop in text]  # fmt: skip
        if found:
            end, _, self.matched = min(found)
            self._held = ""
            return text[: end - len(self.matched)]
        held = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Returns what was held back, at the end of the stream."""
        text, self._held = self._held, ""
        return text

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that is a proper beginning of `stop`."""
        longest = min(len(text), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
