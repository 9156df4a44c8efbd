"""Drafts: tokens that may come next, computed beside a request's newest one to save steps."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from redmux_server.engine.answers import Answers
from redmux_server.engine.draft_state import DraftState
from redmux_server.engine.request import Request, Work
from redmux_server.engine.step_cost import StepCost

_LEAST_CHANCE = 0.1  # of a draft's last token to be drawn
_LEAST_GAIN = 1.05  # in tokens a second: chances and costs are known no better
_PLACES_OF_ONE = 1 << 15  # contexts of an adapter's answers, some 4 MB
_PLACES = 1 << 18  # of all


class Drafts:
    """Guesses what requests will draw, and has as much of that computed as pays.

    A draft changes no token: each is drawn from its own logits as without one (see Stepper), and
    those behind the first wrong guess are not used. So all that a guess can cost is time.

    Guesses come from a request's own text, and from what the same tenant's requests for the same
    adapter have answered. How often guesses of their kind were right is their chance, and what
    further rows cost is learned from the steps (StepCost): of all guesses, a step computes those
    with which it brings the most tokens a second. Owned by the engine thread.
    """

    def __init__(self, max_batch_tokens: int, cost: StepCost | None = None) -> None:
        """A step has at most so many tokens, those of drafts included."""
        self._max_batch_tokens = max_batch_tokens
        self._answers: OrderedDict[tuple[str, str], Answers] = OrderedDict()  # least recent first
        self._cost = cost or StepCost()
        self.num_places = 0  # contexts that all answers keep

    def add_to(self, work: Sequence[Work], make_place: Callable[[Request, int], int]) -> list[Work]:
        """Returns the work of a step with drafts where they pay.

        `make_place` tells for how many tokens of a draft a request has place, up to so many.
        """
        drafting = {i: item.request for i, item in enumerate(work) if item.may_draft}
        drafted = [*work]
        if not drafting:
            return drafted
        num_tokens = sum(item.count for item in work)
        gain = _Gain(self._cost, len(drafting), num_tokens)
        found: list[tuple[float, int]] = []
        for i, request in drafting.items():
            state = self._state(request)
            state.guess(request, gain.least_chance)
            found += [(one.chance, i) for one in state.next if one.chance >= gain.least_chance]
        found.sort(key=lambda one: -one[0])  # of one request the first comes first
        room = self._max_batch_tokens - num_tokens
        num_paying = gain.num_paying([chance for chance, _ in found[:room]])
        for i, count in Counter(i for _, i in found[:num_paying]).items():
            request, item = drafting[i], work[i]
            if count := make_place(request, count):
                state = self._state(request)
                draft = tuple(one.token_id for one in state.next[:count])
                drafted[i] = replace(item, count=item.count + count, draft=draft)
        return drafted

    def learn(self, work: Iterable[Work]) -> None:
        """Takes in what the requests of a step have drawn."""
        for item in work:
            state = item.request.draft_state
            if state is None:
                continue
            before = len(state.answers)
            state.learn(item.request)
            if self._answers.get(_key(item.request)) is state.answers:
                self.num_places += len(state.answers) - before
        while self.num_places > _PLACES:
            self._forget(next(iter(self._answers)))

    def learn_cost(self, rows: int, seconds: float) -> None:
        """Takes in what a step took that computed decoding requests alone, with their drafts."""
        self._cost.learn(rows, seconds)

    def keep(self, is_there: Callable[[str], bool]) -> None:
        """Forgets the answers of adapters whose digests are not there any more."""
        for key in [key for key in self._answers if key[1] and not is_there(key[1])]:
            self._forget(key)

    def _forget(self, key: tuple[str, str]) -> None:
        self.num_places -= len(self._answers.pop(key))

    def _state(self, request: Request) -> DraftState:
        key = _key(request)
        answers = self._answers.get(key)
        if answers is None:
            answers = self._answers[key] = Answers(_PLACES_OF_ONE)
        self._answers.move_to_end(key)
        if request.draft_state is None:
            before = len(answers)
            request.draft_state = DraftState(request, answers)
            self.num_places += len(answers) - before
        return request.draft_state


class _Gain:
    """Which guesses make a step bring more tokens a second."""

    def __init__(self, cost: StepCost, num_drawing: int, num_tokens: int) -> None:
        """The step computes `num_tokens` without drafts, and draws for so many requests.

        A prompt's tokens are worth what they cost, so they count on neither side.
        """
        self._cost = cost
        self._num_drawing = num_drawing
        self._num_tokens = num_tokens
        self._alone_s = cost.of(num_drawing)
        self._added_s = self._alone_s - cost.of(num_tokens)
        row_s = cost.of(num_tokens + 1) + self._added_s - self._alone_s
        # Of a guess that makes up for its row; further ones and their rows only ask for more.
        self.least_chance = max(_LEAST_CHANCE, row_s * num_drawing / self._alone_s)

    def num_paying(self, chances: Sequence[float]) -> int:
        """Returns how many of these, the best first, bring the most; 0 where none bring much."""
        best, num_paying = _LEAST_GAIN * self._num_drawing / self._alone_s, 0
        expected = float(self._num_drawing)
        for count, chance in enumerate(chances, 1):
            expected += chance
            rate = expected / (self._cost.of(self._num_tokens + count) + self._added_s)
            if rate > best:
                best, num_paying = rate, count
        return num_paying


def _key(request: Request) -> tuple[str, str]:
    return request.tenant, "" if request.adapter is None else request.adapter.digest
