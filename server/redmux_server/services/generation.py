"""GenerationService: from what a caller asks for to text, below every protocol."""

import functools
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace

from redmux.errors import InvalidArgumentError, RedmuxError, RequestCancelledError
from redmux_adapters import Adapter, PromptFormat
from redmux_adapters.text.encoder import Encoded
from redmux_adapters.text.tool_format import ToolFormat
from redmux_server.engine.detokenize import StopMatcher
from redmux_server.engine.engine import Engine
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
from redmux_server.fair_thread import FairThread, portions
from redmux_server.metrics import Metrics
from redmux_server.models.text import TextCodec
from redmux_server.registry.published import Published
from redmux_server.registry.registry import AdapterRegistry
from redmux_server.services.chat import options_of, said_bytes
from redmux_server.services.choice import Choice, Delta, choice_seed
from redmux_server.services.inbox import Inbox
from redmux_server.services.spec import Chat, GenerationSpec, Prompt
from redmux_server.services.tool_grammar import tool_grammar
from redmux_server.services.tools import ToolCallParser
from redmux_server.services.validation import Validator


@dataclass(slots=True)
class PromptScores:
    """Of each token of a prompt its log-probability, None for the first, which follows nothing.

    `top` has of each the likeliest tokens at its place, as many as were asked for.
    """

    logprobs: list[float | None] = field(default_factory=lambda: [None])
    top: list[list[tuple[int, float]]] = field(default_factory=lambda: [[]])


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
    published: Published | None
    adapter: Adapter | None
    tool_format: ToolFormat | None = None  # of the calls that the completion may have


class GenerationService:
    """Resolves, validates, tokenizes and submits; everything that is refused is refused here."""

    def __init__(
        self,
        engine: Engine,
        registry: AdapterRegistry,
        codec: TextCodec,
        validator: Validator,
        metrics: Metrics,
        tokenizing: FairThread,
        decoder_start: int | None = None,
    ) -> None:
        """`tokenizing` is the only thread that encodes with `codec`.

        `decoder_start` is what an encoder-decoder's answers start with, else None.
        """
        self.decoder_start = decoder_start
        self._engine = engine
        self._registry = registry
        self._codec = codec
        self._validator = validator
        self._metrics = metrics
        self._tokenizing = tokenizing

    async def submit(
        self, spec: GenerationSpec, tenant: str
    ) -> tuple[Generation, Published | None]:
        """Returns the accepted generation and the adapter that it is pinned to.

        Raises a RedmuxError for whatever cannot be served; nothing is queued then. `tenant` is
        whose adapters there are and who the scheduler charges; empty charges the adapter.
        """
        try:
            return await self._submit(spec, tenant)
        except RedmuxError as err:
            self._metrics.refused(err.status.name.lower())
            raise

    async def _submit(
        self, spec: GenerationSpec, tenant: str
    ) -> tuple[Generation, Published | None]:
        started_s = time.monotonic()
        sampling = self._validator.sampling(spec)
        self._validator.stops(spec)
        num_choices = self._validator.choices(spec)
        prepared = await self.prepare(spec.adapter, spec.prompt, tenant)
        spec, make_parser = _with_tools(spec, prepared.tool_format)
        max_tokens = self._validator.max_tokens(spec, len(prepared.ids))
        events: Inbox[tuple[Choice, Event]] = Inbox()
        choices = [
            self._choice(spec, index, sampling, prepared, max_tokens, tenant, events, started_s)
            for index in range(num_choices)
        ]
        leader, *followers = [choice.request for choice in choices]
        if spec.prompt_logprobs is not None:
            leader.targets, leader.num_target_top = prepared.ids[1:], spec.prompt_logprobs
        leader.followers = followers
        self._engine.submit(leader)
        scores = None if spec.prompt_logprobs is None else PromptScores()
        generation = Generation(prepared.ids, choices, events, self._engine, scores, make_parser)
        return generation, prepared.published

    def _choice(
        self,
        spec: GenerationSpec,
        index: int,
        sampling: SamplingParams,
        prepared: Prepared,
        max_tokens: int,
        tenant: str,
        events: Inbox[tuple[Choice, Event]],
        started_s: float,
    ) -> Choice:
        """Returns a choice whose request puts its events, beside the choice, into `events`."""
        published = prepared.published
        # Without an answer the last token is only scored, not computed: nothing follows it.
        prompt_ids = prepared.ids if max_tokens else prepared.ids[:-1]
        request = Request(
            prompt_ids=prompt_ids if self.decoder_start is None else [self.decoder_start],
            source_ids=() if self.decoder_start is None else prepared.ids,
            max_tokens=max_tokens,
            sampling=replace(sampling, seed=choice_seed(sampling.seed, index)),
            stop_token_ids=frozenset(spec.stop_token_ids)
            | (frozenset() if spec.ignore_eos else self._codec.eos_token_ids),
            tenant=tenant or (published.name if published else ""),
            adapter=prepared.adapter,
            logprobs=spec.logprobs,
            sink=lambda event: events.put((choice, event)),
            num_top=spec.top_logprobs or 0,
            priority=spec.priority or 0,
            deadline_s=None if spec.timeout_s is None else started_s + spec.timeout_s,
        )
        choice = Choice(
            index,
            request,
            self._codec.decoder(skip_special_tokens=spec.skip_special_tokens),
            StopMatcher(spec.stop, included=spec.include_stop_str),
            includes_stop=spec.include_stop_str,
            num_prompt=len(prepared.ids),
            num_added=prepared.num_added,
            started_s=started_s,
        )
        return choice

    async def prepare(self, adapter: str, prompt: Prompt, tenant: str) -> Prepared:
        """Returns the prompt as token ids, beside the adapter of this name ("" is the base model).

        Raises a RedmuxError for an adapter that is not there or a prompt that cannot be served.
        """
        published = self._registry.resolve(adapter, tenant) if adapter else None
        prompt_format = published.summary.config.prompt_format if published else None
        self._validator.prompt(prompt, prompt_format)
        tenant = tenant or (published.name if published else "")
        encoded, tool_format = await self._encode(prompt, prompt_format, tenant)
        vectors = await self._registry.fetch(published) if published else None
        return Prepared(encoded.ids, encoded.num_added, published, vectors, tool_format)

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


def _with_tools(
    spec: GenerationSpec, form: ToolFormat | None
) -> tuple[GenerationSpec, Callable[[], ToolCallParser] | None]:
    """Returns what is asked for with the grammar of the tools, and what makes their parser."""
    chat = spec.prompt
    if form is None or not isinstance(chat, Chat):
        return spec, None
    is_parallel = chat.parallel_tool_calls
    grammar = tool_grammar(form, chat.tools, chat.tool_choice, is_parallel=is_parallel)
    if grammar is not None:
        if spec.grammar is not None:
            raise InvalidArgumentError(
                f"tool_choice {chat.tool_choice!r} and a grammar exclude each other; leave one out"
            )
        spec = replace(spec, grammar=grammar)
    names = [tool["function"]["name"] for tool in chat.tools]
    return spec, functools.partial(ToolCallParser, form, names, is_parallel=is_parallel)
