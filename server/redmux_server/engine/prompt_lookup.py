"""PromptLookup: where the newest tokens of a request have stood before in its own text."""

from collections.abc import Sequence
from itertools import pairwise

_MOST_TOKENS = 4096  # of a prompt that are looked at, the newest
LONGEST_MATCH = 4


class PromptLookup:
    """The newest place behind every token and every two tokens of a request."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        """`token_ids` are the request's own so far."""
        ids = self._ids = list(token_ids[-_MOST_TOKENS:])
        # What has nothing behind it is left out: the newest token is what is looked up.
        self._behind_one = dict(zip(ids, range(1, len(ids)), strict=False))
        self._behind_two = dict(zip(pairwise(ids), range(2, len(ids)), strict=False))

    def add(self, token_id: int) -> None:
        """Takes the next token of the request."""
        ids = self._ids
        if ids:
            self._behind_one[ids[-1]] = len(ids)
        if len(ids) > 1:
            self._behind_two[ids[-2], ids[-1]] = len(ids)
        ids.append(token_id)

    def find(self, before: Sequence[int]) -> tuple[int, int] | None:
        """Returns a place whose tokens before it are the last of these, and how many are.

        That is at most `LONGEST_MATCH`, and of `before` no more are looked at.
        """
        place = self._behind_two.get((before[-2], before[-1])) if len(before) > 1 else None
        if place is None and (place := self._behind_one.get(before[-1])) is None:
            return None
        length, most = 1, min(LONGEST_MATCH, place, len(before))
        while length < most and self._ids[place - 1 - length] == before[-1 - length]:
            length += 1
        return place, length

    def at(self, place: int) -> int | None:
        """Returns the token of a place, None behind the newest one."""
        return self._ids[place] if place < len(self._ids) else None
