"""Choice: one of the completions of a prompt, from the engine's events to text."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from redmux_server.engine.detokenize import Detokenizer, StopMatcher
from redmux_server.engine.request import Finished, FinishReason, Request, Token


@dataclass(frozen=True, slots=True)
class Finish:
    """How a completion ended; times are seconds since it was asked for."""

    reason: FinishReason
    stop: str  # the stop text that ended it, or ""
    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt, found in the cache
    num_added_tokens: int  # of the prompt, special tokens that the server put there
    num_completion_tokens: int
    stop_token_id: int | None = None  # the token that ended it: a stop token or an end of text
    first_token_s: float | None = None
    total_s: float = 0.0


@dataclass(slots=True)
class Delta:
    """What was generated of a choice since its last one; `finish` is set in the last."""

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, following: "Delta") -> None:
        """Takes in the next delta of the same choice."""
        self.text += following.text
        self.token_ids += following.token_ids
        self.logprobs += following.logprobs
        self.top_logprobs += following.top_logprobs
        self.finish = following.finish


class Choice:
    """Turns the tokens of one request into text, up to where it ends."""

    def __init__(
        self,
        index: int,
        request: Request,
        decode: Callable[[Sequence[int]], str],
        matcher: StopMatcher,
        *,
        includes_stop: bool,
        num_prompt: int,
        num_added: int,
        started_s: float,
    ) -> None:
        """With `includes_stop` the text of a stop token is part of the text.

        `started_s` is when it was asked for, of time.monotonic(). `num_prompt` tokens of the
        prompt, `num_added` special ones of the server's among them, are told at the end.
        """
        self.index = index
        self.request = request
        self.has_ended = False
        self._detokenizer = Detokenizer(decode)
        self._matcher = matcher
        self._includes_stop = includes_stop
        self._num_prompt = num_prompt
        self._num_added = num_added
        self._started_s = started_s
        self._first_token_s: float | None = None
        self._num_tokens = 0
        self._last_token_id: int | None = None

    def take(self, event: Token | Finished, delta: Delta) -> None:
        """Adds what an event brings to a delta, and how the choice ended once it has."""
        if isinstance(event, Finished):
            delta.text += self._matcher.push(self._detokenizer.flush()) + self._matcher.flush()
            stopped = event.reason is FinishReason.STOP or self._matcher.matched is not None
            self._finish(FinishReason.STOP if stopped else FinishReason.LENGTH, delta)
            return
        if self._first_token_s is None:
            self._first_token_s = time.monotonic() - self._started_s
        self._num_tokens += 1
        self._last_token_id = event.token_id
        delta.token_ids.append(event.token_id)
        if event.logprob is not None:
            delta.logprobs.append(event.logprob)
            delta.top_logprobs.append(list(event.top))
        if self._includes_stop or event.token_id not in self.request.stop_token_ids:
            may_stop = self._num_tokens > self.request.sampling.min_tokens
            text = self._detokenizer.push([event.token_id])
            delta.text += self._matcher.push(text, may_stop=may_stop)
        if self._matcher.matched is not None:
            self._finish(FinishReason.STOP, delta)

    def _finish(self, reason: FinishReason, delta: Delta) -> None:
        self.has_ended = True
        # A grammar that is complete ends a choice without either.
        by_token = (
            reason is FinishReason.STOP
            and self._matcher.matched is None
            and self._last_token_id in self.request.stop_token_ids
        )
        delta.finish = Finish(
            reason=reason,
            stop=self._matcher.matched or "",
            num_prompt_tokens=self._num_prompt,
            num_cached_tokens=min(self.request.num_cached, self._num_prompt),
            num_added_tokens=self._num_added,
            num_completion_tokens=self._num_tokens,
            stop_token_id=self._last_token_id if by_token else None,
            first_token_s=self._first_token_s,
            total_s=time.monotonic() - self._started_s,
        )


def choice_seed(seed: int, index: int) -> int:
    """Returns the seed of one of several choices; the first has the request's own."""
    if not index:
        return seed
    mixed = blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(mixed, "little")
