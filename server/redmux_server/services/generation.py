"""GenerationService: from what a caller asks for to text, below every protocol."""

import asyncio
import functools
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from redmux.errors import RedmuxError, RequestCancelledError
from redmux_adapters import Adapter, PromptFormat
from redmux_adapters.text.encoder import Encoded
from redmux_server.engine.detokenize import Detokenizer, StopMatcher
from redmux_server.engine.engine import Engine
from redmux_server.engine.request import Event, Failed, Finished, FinishReason, Request, Token
from redmux_server.fair_thread import FairThread, portions
from redmux_server.metrics import Metrics
from redmux_server.models.text import TextCodec
from redmux_server.registry.published import Published
from redmux_server.registry.registry import AdapterRegistry
from redmux_server.services.grammar import Grammars
from redmux_server.services.spec import Chat, GenerationSpec, Prompt
from redmux_server.services.validation import Validator


@dataclass(frozen=True, slots=True)
class Finish:
    """How a completion ended."""

    reason: FinishReason
    stop: str  # the stop text that ended it, or ""
    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt, found in the cache
    num_added_tokens: int  # of the prompt, special tokens that the server put there
    num_completion_tokens: int


@dataclass(slots=True)
class Delta:
    """What was generated since the last one; `finish` is set in the last."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None


class EventInbox:
    """The events of one request on their way from the engine to their one reader.

    Belongs to the event loop. A reader is woken once, however many events a step brings.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        """Adds an event; the request's sink."""
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Event]:
        """Returns everything that came since the last call, waiting for a first event."""
        if not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        events, self._events = self._events, []
        return events


class Generation:
    """One accepted request, read by one consumer through `deltas`."""

    def __init__(
        self,
        request: Request,
        events: EventInbox,
        engine: Engine,
        codec: TextCodec,
        stops: Sequence[str],
        num_added: int = 0,
    ) -> None:
        """`events` is where the request's sink puts them; `num_added` is told at the end."""
        self._request = request
        self._events = events
        self._engine = engine
        self._detokenizer = Detokenizer(codec.decode)
        self._matcher = StopMatcher(stops)
        self._num_added = num_added
        self._num_tokens = 0

    async def deltas(self) -> AsyncGenerator[Delta]:
        """Yields everything that is ready at a time, until the completion ends.

        Raises the request's error. Closing the iterator early cancels the request.
        """
        try:
            finish = None
            while finish is None:
                delta = Delta()
                for event in await self._events.take():
                    finish = self._take(event, delta)
                    if finish is not None:
                        break
                delta.finish = finish
                if delta.text or delta.token_ids or finish is not None:
                    yield delta
        finally:
            cancelled = RequestCancelledError("the request was cancelled")
            self._engine.end(self._request, Failed(cancelled))

    def _take(self, event: Event, delta: Delta) -> Finish | None:
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            delta.text += self._matcher.push(self._detokenizer.flush()) + self._matcher.flush()
            return self._finish(
                event.reason if self._matcher.matched is None else FinishReason.STOP
            )
        assert isinstance(event, Token)  # it scores nothing
        self._num_tokens += 1
        delta.token_ids.append(event.token_id)
        if event.logprob is not None:
            delta.logprobs.append(event.logprob)
        if event.token_id not in self._request.stop_token_ids:
            delta.text += self._matcher.push(self._detokenizer.push([event.token_id]))
        if self._matcher.matched is None:
            return None
        self._engine.end(self._request, Finished(FinishReason.STOP))
        return self._finish(FinishReason.STOP)

    def _finish(self, reason: FinishReason) -> Finish:
        return Finish(
            reason=reason,
            stop=self._matcher.matched or "",
            num_prompt_tokens=len(self._request.source_ids or self._request.prompt_ids),
            num_cached_tokens=self._request.num_cached,
            num_added_tokens=self._num_added,
            num_completion_tokens=self._num_tokens,
        )


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt for the engine, and the adapter that it is pinned to."""

    ids: list[int]
    num_added: int  # of them, special tokens that no text asked for
    published: Published | None
    adapter: Adapter | None


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
        grammars: Grammars,
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
        self._grammars = grammars

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
        sampling = self._validator.sampling(spec)
        self._validator.stops(spec)
        self._validator.grammar(spec)
        prepared = await self.prepare(spec.adapter, spec.prompt, tenant)
        published = prepared.published
        matcher = None
        if spec.grammar is not None:
            matcher = await self._grammars.matcher(spec.grammar, tenant)
        events = EventInbox()
        request = Request(
            prompt_ids=prepared.ids if self.decoder_start is None else [self.decoder_start],
            source_ids=() if self.decoder_start is None else prepared.ids,
            max_tokens=self._validator.max_tokens(spec.max_tokens, len(prepared.ids)),
            sampling=sampling,
            stop_token_ids=frozenset(spec.stop_token_ids)
            | (frozenset() if spec.ignore_eos else self._codec.eos_token_ids),
            tenant=tenant or (published.name if published else ""),
            adapter=prepared.adapter,
            logprobs=spec.logprobs,
            sink=events.put,
            matcher=None if matcher is None else matcher.copy(),
        )
        self._engine.submit(request)
        generation = Generation(
            request, events, self._engine, self._codec, list(spec.stop), prepared.num_added
        )
        return generation, published

    async def prepare(self, adapter: str, prompt: Prompt, tenant: str) -> Prepared:
        """Returns the prompt as token ids, beside the adapter of this name ("" is the base model).

        Raises a RedmuxError for an adapter that is not there or a prompt that cannot be served.
        """
        published = self._registry.resolve(adapter, tenant) if adapter else None
        prompt_format = published.summary.config.prompt_format if published else None
        self._validator.prompt(prompt, prompt_format)
        tenant = tenant or (published.name if published else "")
        encoded = await self._encode(prompt, prompt_format, tenant)
        vectors = await self._registry.fetch(published) if published else None
        return Prepared(encoded.ids, encoded.num_added, published, vectors)

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
    ) -> Encoded:
        codec, most = self._codec, self._validator.max_context
        if isinstance(prompt, str):
            cost, work = len(prompt), functools.partial(codec.encode, prompt, most)
        elif isinstance(prompt, Chat):
            messages = list(prompt.messages)
            cost = sum(len(message["content"]) for message in messages)
            work = functools.partial(
                codec.encode_chat, messages, prompt_format,
                parse_special=prompt.parse_special, most=most,
            )  # fmt: skip
        else:
            return Encoded(list(prompt))
        return await self._tokenizing.run(tenant, cost, work)
