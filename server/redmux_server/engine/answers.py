"""Answers: which token has followed which in what an adapter has answered before."""

from typing import NamedTuple

_LENGTHS = (6, 3, 1)  # tokens of a context, the longest first
LONGEST = _LENGTHS[0]
_BEFORE = -1  # stands before the first token of every answer
START = (_BEFORE,) * LONGEST
_MOST_SURE = 3  # times in a row that tell of a place whether it is sure
_STATES = _MOST_SURE + 1
SURE = 0.9  # whoever is as sure as this is not compared with others
_WEIGHT = 4.0  # of what is expected before anything is known, in tries
_MEMORY = 0.98  # of earlier tries at each new one


class Tries:
    """How often guesses of one kind were right, the newest ones counting most."""

    __slots__ = ("chance", "num", "num_right")

    def __init__(self, chance: float = 0.0, num: float = 0.0) -> None:
        """`chance` is what is expected, as if it were known from so many tries."""
        self.chance = chance  # of the next one
        self.num = num
        self.num_right = chance * num

    def add(self, is_right: bool) -> None:
        """Counts another one."""
        self.num = _MEMORY * self.num + 1
        self.num_right = _MEMORY * self.num_right + is_right
        self.chance = self.num_right / self.num


class Guess(NamedTuple):
    """A token that may come next, and what this guess counts for once it is known."""

    token_id: int
    chance: float
    tries: tuple[Tries, ...]


class Answers:
    """What has followed the last 6, 3 and 1 tokens of answers, and how often that held again.

    Of each context it keeps the hash, the token that followed and how many times in a row, so a
    place takes about 120 bytes. Two contexts of one hash are a wrong guess, which costs time alone.
    What was seen longest ago goes first, half of all that is kept at a time.
    """

    def __init__(self, max_places: int) -> None:
        """`max_places` bounds the contexts that are kept."""
        self._max_places = max_places
        # Context's hash -> token that followed, and in the last digit of base _STATES how sure.
        self._new: dict[int, int] = {}
        self._old: dict[int, int] = {}
        # A chance is what came true of guesses of this length and sureness.
        self._tries = [
            [Tries(_expected(length, sure), _WEIGHT) for sure in range(_STATES)]
            for length in _LENGTHS
        ]
        # Of copies from the text itself, by the length of the match.
        self.copies = [Tries(chance, _WEIGHT) for chance in (0.2, 0.35, 0.5, 0.65)]

    def __len__(self) -> int:
        return len(self._new) + len(self._old)

    def guess(self, context: tuple[int, ...]) -> Guess | None:
        """Returns what is likeliest behind the newest `LONGEST` tokens of an answer."""
        new, old = self._new, self._old
        best, best_found = None, 0
        for length, tries in zip(_LENGTHS, self._tries, strict=True):
            key = hash(context[-length:])
            found = new.get(key)
            if found is None and (found := old.get(key)) is None:
                continue
            of_kind = tries[found % _STATES]
            if best is None or of_kind.chance > best.chance:
                best, best_found = of_kind, found
                if best.chance > SURE:
                    break
        return None if best is None else Guess(best_found // _STATES, best.chance, (best,))

    def add(self, context: tuple[int, ...], token_id: int) -> None:
        """Learns which token came behind the newest `LONGEST` tokens of an answer."""
        new, old = self._new, self._old
        first = token_id * _STATES
        for length in _LENGTHS:
            key = hash(context[-length:])
            found = new.get(key)
            if found is None:
                found = old.pop(key, None)
            if found is None:
                found = first
            elif first <= found < first + _MOST_SURE:
                found += 1
            elif found != first + _MOST_SURE:
                sure = found % _STATES
                found = found - (sure + 1) // 2 if sure else first
            new[key] = found
        if len(new) > self._max_places // 2:
            self._old, self._new = new, {}


def _expected(length: int, sure: int) -> float:
    return 1 - (1 - min(0.4, 0.2 + 0.04 * length)) * 0.7**sure
