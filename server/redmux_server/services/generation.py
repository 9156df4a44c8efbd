"""GenerationService: from what a caller asks for to text, below every protocol."""

import functools
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace

from redmux.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    RedmuxError,
    RequestCancelledError,
)
from redmux_adapters import Adapter, PromptFormat
from redmux_adapters.text.encoder import Encoded
from redmux_adapters.text.tool_format import ToolFormat
from redmux_server.engine.detokenize import StopMatcher
from redmux_server.engine.engine import Engine
from redmux_server.engine.grammar import Matcher
from redmux_server.engine.request import (
    Event,
    Failed,
    Finished,
    FinishReason,
    Request,
    SamplingParams,
    Scored,
    Token,
)
from redmux_server.engine.stop_pattern import StopPattern
from redmux_server.fair_thread import FairThread, portions
from redmux_server.metrics import Metrics
from redmux_server.models.text import TextCodec
from redmux_server.services.chat import options_of, said_bytes
from redmux_server.services.choice import Choice, Delta, choice_seed
from redmux_server.services.grammar import Grammars
from redmux_server.services.inbox import Inbox
from redmux_server.services.pinning import Pinned, Pins
from redmux_server.services.spec import Chat, GenerationSpec, Prompt, ScoreSpec
from redmux_server.services.tool_grammar import with_tools
from redmux_server.services.tools import ToolCallParser
from redmux_server.services.validation import Validator
from redmux_server.services.windows import Windows


def generates_nothing() -> FailedPreconditionError:
    """Returns what is raised where a generation is asked of a model without this service."""
    return FailedPreconditionError(
        "the model is an encoder, which generates nothing; use Classify or Embed"
    )


@dataclass(slots=True)
class PromptScores:
    """Of each token of a prompt its log-probability, None for the first, which follows nothing.

    `top` has of each the likeliest tokens at its place, as many as were asked for.
    """

    logprobs: list[float | None] = field(default_factory=lambda: [None])
    top: list[list[tuple[int, float]]] = field(default_factory=lambda: [[]])

    @property
    def known(self) -> list[float]:
        """The log-probabilities of all tokens but the first."""
        return [logprob for logprob in self.logprobs if logprob is not None]


class Generation:
    """The accepted choices of one prompt, read by one consumer through `deltas`.

    `prompt_scores` is there if they were asked for, and complete once the first delta is.
    """

    def __init__(
        self,
        prompt_ids: list[int],
        choices: Sequence[Choice],
        events: Inbox[tuple[Choice, Event]],
        engine: Engine,
        prompt_scores: PromptScores | None = None,
        make_parser: Callable[[], ToolCallParser] | None = None,
    ) -> None:
        """`events` is where the sinks of the choices' requests put them.

        `make_parser` makes what finds calls of tools in a choice.
        """
        self.prompt_ids = prompt_ids
        self.prompt_scores = prompt_scores
        self._choices = choices
        self._make_parser = make_parser
        self._events = events
        self._engine = engine

    def tool_parser(self) -> ToolCallParser | None:
        """Returns what finds calls of tools in the text of a choice; None where there are none."""
        return None if self._make_parser is None else self._make_parser()

    async def deltas(self) -> AsyncGenerator[Delta]:
        """Yields everything that is ready at a time, until every choice has its finish.

        The choices take turns as they come. Raises the error of the request, which ends all of
        them. Closing the iterator early cancels them.
        """
        try:
            num_open = len(self._choices)
            while num_open:
                for delta in self._take(await self._events.take()):
                    num_open -= delta.finish is not None
                    if delta.text or delta.token_ids or delta.finish is not None:
                        yield delta
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Ends every choice that has not ended; needed only if `deltas` was never begun."""
        cancelled = RequestCancelledError("the request was cancelled")
        for choice in self._choices:
            self._engine.end(choice.request, Failed(cancelled))

    def _take(self, events: Sequence[tuple[Choice, Event]]) -> list[Delta]:
        deltas: dict[int, Delta] = {}
        for choice, event in events:
            if choice.has_ended:
                continue
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Scored):
                if self.prompt_scores is not None:
                    self.prompt_scores.logprobs += event.logprobs
                    self.prompt_scores.top += event.top or [[] for _ in event.logprobs]
                continue
            assert isinstance(event, Token | Finished)  # nothing is read
            delta = deltas.setdefault(choice.index, Delta(choice.index))
            choice.take(event, delta)
            if choice.has_ended and isinstance(event, Token):
                self._engine.end(choice.request, Finished(FinishReason.STOP))
        return list(deltas.values())


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt for the engine, and the adapter that it is pinned to."""

    ids: list[int]
    num_added: int  # of them, special tokens that no text asked for
    published: Pinned | None
    adapter: Adapter | None
    edited: range  # positions that the adapter edits
    owner: str  # whose cached prompts it shares
    tool_format: ToolFormat | None = None  # of the calls that the completion may have


@dataclass(frozen=True, slots=True)
class _Accepted:
    """What a caller asked for, checked, and what all its choices have in common."""

    spec: GenerationSpec
    sampling: SamplingParams
    pattern: StopPattern | None
    prepared: Prepared
    max_tokens: int
    tenant: str
    started_s: float
    matcher: Matcher | None


class GenerationService:
    """Resolves, validates, tokenizes and submits; everything that is refused is refused here."""

    def __init__(
        self,
        engine: Engine,
        pins: Pins,
        codec: TextCodec,
        validator: Validator,
        metrics: Metrics,
        tokenizing: FairThread,
        grammars: Grammars,
        decoder_start: int | None = None,
    ) -> None:
        """`tokenizing` is the only thread that encodes with `codec`.

        `decoder_start` is what an encoder-decoder's answers start with, else None.
        """
        self.decoder_start = decoder_start
        self._engine = engine
        self._pins = pins
        self._codec = codec
        self._validator = validator
        self._metrics = metrics
        self._tokenizing = tokenizing
        self._grammars = grammars
        self._windows = Windows(codec, tokenizing, has_source=decoder_start is not None)

    async def submit(self, spec: GenerationSpec, tenant: str) -> tuple[Generation, Pinned | None]:
        """Returns the accepted generation and the adapter that it is pinned to.

        Raises a RedmuxError for whatever cannot be served; nothing is queued then. `tenant` is
        whose adapters there are and who the scheduler charges; empty charges the adapter.
        """
        try:
            return await self._submit(spec, tenant)
        except RedmuxError as err:
            self._metrics.refused(err.status.name.lower())
            raise

    async def _submit(self, spec: GenerationSpec, tenant: str) -> tuple[Generation, Pinned | None]:
        started_s = time.monotonic()
        sampling = self._validator.sampling(spec)
        pattern = self._validator.stops(spec)
        self._validator.rest(spec)
        if (spec.n or 1) > self._engine.most_for_one:
            raise InvalidArgumentError(
                f"n is {spec.n}; this server has places for {self._engine.most_for_one} open "
                "requests of one caller"
            )
        self._validator.grammar(spec)
        if self.decoder_start is not None and spec.prompt_logprobs is not None:
            raise InvalidArgumentError(
                "the encoder of the model reads the prompt, so it has no log-probabilities"
            )
        prepared = await self.prepare(spec, tenant)
        spec, make_parser = with_tools(spec, prepared.tool_format)
        self._validator.grammar(spec)
        max_tokens = self._validator.max_tokens(spec, len(prepared.ids))
        asker = tenant
        tenant = tenant or (prepared.published.name if prepared.published else "")
        sampling = await self._without_bad_words(sampling, spec.bad_words, tenant)
        matcher = None
        if spec.grammar is not None:
            matcher = await self._grammars.matcher(spec.grammar, asker)
        accepted = _Accepted(
            spec, sampling, pattern, prepared, max_tokens, tenant, started_s, matcher
        )
        events: Inbox[tuple[Choice, Event]] = Inbox()
        choices = [self._choice(index, accepted, events) for index in range(spec.n or 1)]
        leader, *followers = [choice.request for choice in choices]
        leader.followers = followers
        scores = None
        if spec.prompt_logprobs is not None:
            leader.targets, leader.num_target_top = prepared.ids[1:], spec.prompt_logprobs
            scores = PromptScores()
        self._engine.submit(leader)
        generation = Generation(prepared.ids, choices, events, self._engine, scores, make_parser)
        return generation, prepared.published

    def _choice(
        self, index: int, accepted: _Accepted, events: Inbox[tuple[Choice, Event]]
    ) -> Choice:
        """Returns a choice whose request puts its events, beside the choice, into `events`."""
        spec, prepared = accepted.spec, accepted.prepared
        # Without an answer the last token is only scored, not computed: nothing follows it.
        prompt_ids = prepared.ids if accepted.max_tokens else prepared.ids[:-1]
        request = Request(
            prompt_ids=prompt_ids if self.decoder_start is None else [self.decoder_start],
            source_ids=() if self.decoder_start is None else prepared.ids,
            max_tokens=accepted.max_tokens,
            sampling=replace(accepted.sampling, seed=choice_seed(accepted.sampling.seed, index)),
            stop_token_ids=frozenset(spec.stop_token_ids)
            | (frozenset() if spec.ignore_eos else self._codec.eos_token_ids),
            tenant=accepted.tenant,
            adapter=prepared.adapter,
            logprobs=spec.logprobs,
            sink=lambda event: events.put((choice, event)),
            matcher=None if accepted.matcher is None else accepted.matcher.copy(),
            num_top=spec.top_logprobs or 0,
            priority=spec.priority or 0,
            deadline_s=None if spec.timeout_s is None else accepted.started_s + spec.timeout_s,
            edited=prepared.edited,
            owner=prepared.owner,
        )
        choice = Choice(
            index,
            request,
            self._codec.decoder(skip_special_tokens=spec.skip_special_tokens),
            StopMatcher(spec.stop, accepted.pattern, included=spec.include_stop_str),
            includes_stop=spec.include_stop_str,
            num_prompt=len(prepared.ids),
            num_added=prepared.num_added,
            started_s=accepted.started_s,
        )
        return choice

    async def prepare(self, spec: GenerationSpec | ScoreSpec, tenant: str) -> Prepared:
        """Returns the prompt as token ids, beside the adapter that is meant.

        Raises a RedmuxError for an adapter that is not there or a prompt that cannot be served.
        """
        self._windows.check(spec.apply, spec.adapter)
        prompt, owner = spec.prompt, tenant
        published = await self._pins.pin(spec.adapter, tenant)
        prompt_format = published.summary.config.prompt_format if published else None
        self._validator.prompt(prompt, prompt_format)
        tenant = tenant or (published.name if published else "")
        encoded, tool_format = await self._encode(prompt, prompt_format, tenant)
        vectors = await self._pins.fetch(published) if published else None
        edited = await self._windows.positions(vectors, spec.apply, encoded.ids, tenant)
        return Prepared(
            encoded.ids, encoded.num_added, published, vectors, edited, owner, tool_format
        )

    async def _without_bad_words(
        self, sampling: SamplingParams, words: Sequence[str], tenant: str
    ) -> SamplingParams:
        """Returns the parameters with the tokens of these words, each behind a space or not."""
        if not words:
            return sampling
        texts = [text for word in words for text in (word, " " + word.lstrip())]

        def encode() -> list[tuple[int, ...]]:
            return [tuple(self._codec.encode_bare(text)) for text in texts]

        cost = sum(map(len, texts))
        sequences = sorted(set(await self._tokenizing.run(tenant, cost, encode)))
        single = [sequence[0] for sequence in sequences if len(sequence) == 1]
        return replace(
            sampling,
            bad_token_ids=(*sampling.bad_token_ids, *single),
            bad_sequences=[sequence for sequence in sequences if len(sequence) > 1],
        )

    async def encode_continuations(
        self, prompt: Prompt, prompt_ids: list[int], texts: Sequence[str], tenant: str
    ) -> list[list[int]]:
        """Returns the ids of texts that follow a prompt; see TextCodec.encode_continuation."""
        before = prompt if isinstance(prompt, str) and self.decoder_start is None else None
        most = self._validator.max_context

        def encode(some: list[str]) -> list[list[int]]:
            return [
                self._codec.encode_continuation(before, prompt_ids, text, most) for text in some
            ]

        def num_chars(text: str) -> int:
            return len(before or "") + len(text)

        found: list[list[int]] = []
        for some in portions(texts, num_chars):
            cost = sum(map(num_chars, some))
            found += await self._tokenizing.run(tenant, cost, functools.partial(encode, some))
        return found

    async def _encode(
        self, prompt: Prompt, prompt_format: PromptFormat | None, tenant: str
    ) -> tuple[Encoded, ToolFormat | None]:
        if isinstance(prompt, str):
            text = functools.partial(self._codec.encode, prompt, self._validator.max_context)
            return await self._tokenizing.run(tenant, len(prompt), text), None
        if not isinstance(prompt, Chat):
            return Encoded(list(prompt)), None
        chat = functools.partial(self._encode_chat, prompt, prompt_format)
        return await self._tokenizing.run(tenant, said_bytes(prompt.messages), chat)

    def _encode_chat(
        self, chat: Chat, prompt_format: PromptFormat | None
    ) -> tuple[Encoded, ToolFormat | None]:
        """Returns a chat's ids, and how its tools are called if it has any."""
        options, most = options_of(chat), self._validator.max_context
        encoded = self._codec.encode_chat(chat.messages, prompt_format, options, most=most)
        return encoded, self._codec.tool_format(chat.template) if options.tools else None
