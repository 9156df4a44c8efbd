"""DraftState: what may come next of one request."""

from typing import NamedTuple

from redmux_server.engine.answers import START, SURE, Answers, Guess, Tries
from redmux_server.engine.prompt_lookup import LONGEST_MATCH, PromptLookup
from redmux_server.engine.request import Request

_MOST_TOKENS = 15  # of a draft
_WEIGHT = 4.0  # of what an adapter's copies came to, in tries of the request's own


class Next(NamedTuple):
    """The likeliest token of a place."""

    token_id: int
    chance: float  # that it is drawn, and all those before it
    guesses: list[Guess]  # of all who have one there


class DraftState:
    """What drafts need of a request, kept between its steps."""

    def __init__(self, request: Request, answers: Answers) -> None:
        """`answers` are those that its guesses come from, and that its own ones go to."""
        self.answers = answers
        self.next: list[Next] = []  # what was guessed for the newest step
        self._lookup = PromptLookup(request.prompt_ids)
        self._context = START
        self._num_known = len(request.prompt_ids)
        # By the length of the match: whether an answer quotes is its own affair.
        self._copies = [Tries() for _ in range(LONGEST_MATCH)]
        self.learn(request)

    def guess(self, request: Request, least_chance: float) -> None:
        """Sets `next` to what may come, up to the first token with a lesser chance than that.

        That one is there, too, so that its guesses are compared with what is drawn.
        """
        self.next = []
        said = request.token_ids[-LONGEST_MATCH:]
        context, chance = self._context, 1.0
        match: tuple[int, int] | None = None  # place of the copy's next token, and its length
        for _ in range(min(_MOST_TOKENS, request.max_tokens - request.num_output - 1)):
            best = self.answers.guess(context)
            guesses = [] if best is None else [best]
            if best is None or best.chance < SURE:
                match = match or self._lookup.find(said)
                if match is not None and (copy := self._copy(*match)) is not None:
                    guesses.append(copy)
                    if best is None or copy.chance > best.chance:
                        best = copy
            if best is None:
                break
            # Behind the end nothing is drawn.
            chance = 0.0 if best.token_id in request.stop_token_ids else chance * best.chance
            self.next.append(Next(best.token_id, chance, guesses))
            if chance < least_chance:
                break
            if match is not None and self._lookup.at(match[0]) == best.token_id:
                match = match[0] + 1, min(LONGEST_MATCH, match[1] + 1)
            else:
                match = None
            said = [*said[1 - LONGEST_MATCH :], best.token_id]
            context = (*context[1:], best.token_id)

    def learn(self, request: Request) -> None:
        """Takes in what the request has drawn since the last call."""
        for i, token_id in enumerate(request.token_ids[self._num_known :]):
            if i < len(self.next):
                for guess in self.next[i].guesses:
                    for tries in guess.tries:
                        tries.add(guess.token_id == token_id)
            self.answers.add(self._context, token_id)
            self._context = (*self._context[1:], token_id)
            self._lookup.add(token_id)
        self._num_known = len(request.token_ids)
        self.next = []

    def _copy(self, place: int, length: int) -> Guess | None:
        token_id = self._lookup.at(place)
        if token_id is None:
            return None
        own, others = self._copies[length - 1], self.answers.copies[length - 1]
        chance = (_WEIGHT * others.chance + own.num_right) / (_WEIGHT + own.num)
        return Guess(token_id, chance, (own, others))
