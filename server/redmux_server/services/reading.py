"""ReadingService: from inputs to vectors and classifications, below every protocol."""

import asyncio
import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from redmux.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    RedmuxError,
    RequestCancelledError,
    UnimplementedError,
)
from redmux_adapters import HeadConfig
from redmux_adapters.text.encoder import Encoded
from redmux_server.engine.engine import Engine
from redmux_server.engine.request import (
    Event,
    Failed,
    Pooling,
    Read,
    Reading,
    Request,
    SamplingParams,
)
from redmux_server.fair_thread import FairThread, portions
from redmux_server.metrics import Metrics
from redmux_server.models.text import TextCodec
from redmux_server.services.pinning import Pinned, Pins
from redmux_server.services.spec import AdapterRef, ReadInput, TextPair
from redmux_server.services.validation import Validator
from redmux_server.services.windows import Windows

MAX_INPUTS = 1024
_ANSWER_BYTES = 3 << 20  # of values, so that a message stays below gRPC's usual limit


@dataclass(frozen=True, slots=True)
class Embeddings:
    """A vector per input, and what made them."""

    vectors: Sequence[Sequence[float]]
    published: Pinned | None
    num_tokens: int
    num_added_tokens: int  # of them, special tokens that the server put there


@dataclass(frozen=True, slots=True)
class Classifications:
    """Logits and scores per input in the order of the head's labels, and what made them."""

    logits: Sequence[Sequence[float]]
    scores: Sequence[Sequence[float]]
    head: HeadConfig
    published: Pinned
    num_tokens: int
    num_added_tokens: int  # of them, special tokens that the server put there


@dataclass(frozen=True, slots=True)
class ReadableModel:
    """What of a model matters for reading it."""

    kind: str  # "encoder", "decoder" or "encoder_decoder"
    architecture: str
    hidden_size: int
    default_pooling: Pooling


class ReadingService:
    """Resolves, validates, tokenizes, submits and waits; an input is a request of its own."""

    def __init__(
        self,
        model: ReadableModel,
        engine: Engine,
        pins: Pins,
        codec: TextCodec,
        validator: Validator,
        metrics: Metrics,
        tokenizing: FairThread,
    ) -> None:
        """`tokenizing` is the only thread that encodes with `codec`."""
        self._model = model
        self._engine = engine
        self._pins = pins
        self._codec = codec
        self._validator = validator
        self._metrics = metrics
        self._tokenizing = tokenizing
        self._windows = Windows(codec, tokenizing, has_source=False)
        fitting = _ANSWER_BYTES // (4 * model.hidden_size)
        self._max_inputs = max(1, min(MAX_INPUTS, fitting, engine.most_for_one))

    async def embed(
        self,
        inputs: Sequence[ReadInput],
        adapter: AdapterRef,
        pooling: Pooling | None,
        normalize: bool,
        tenant: str,
        priority: int = 0,
    ) -> Embeddings:
        """Returns the vector of each input.

        `adapter` "" is the base model, `pooling` None what is usual for the kind of model,
        `priority` that of `GenerationSpec`. Raises a RedmuxError for whatever cannot be served;
        nothing is queued then.
        """
        try:
            if self._model.kind == "encoder_decoder":
                raise UnimplementedError("encoder-decoder models cannot embed yet")
            published = await self._pins.pin(adapter, tenant)
            reading = Reading(pooling or self._model.default_pooling, normalize)
            calls = await self._submit(inputs, published, reading, tenant, priority)
        except RedmuxError as err:
            self._metrics.refused(err.status.name.lower())
            raise
        vectors = await self._wait(calls)
        return Embeddings(vectors, published, _num_tokens(calls), _num_added(calls))

    async def classify(
        self, inputs: Sequence[ReadInput], adapter: AdapterRef, tenant: str, priority: int = 0
    ) -> Classifications:
        """Returns what the head of the adapter makes of each input.

        `priority` is that of `GenerationSpec`. Raises FailedPreconditionError, saying why, where
        model or adapter have no head that could.
        """
        try:
            published, head = await self._resolve_head(adapter, tenant)
            calls = await self._submit(inputs, published, Reading(None), tenant, priority)
        except RedmuxError as err:
            self._metrics.refused(err.status.name.lower())
            raise
        logits = await self._wait(calls)
        scores = [scores_of(row, head.problem_type) for row in logits]
        return Classifications(
            logits, scores, head, published, _num_tokens(calls), _num_added(calls)
        )

    async def _resolve_head(self, adapter: AdapterRef, tenant: str) -> tuple[Pinned, HeadConfig]:
        if self._model.kind != "encoder":
            raise FailedPreconditionError(
                f"the model is of kind {self._model.kind} ({self._model.architecture}), which "
                "classifies nothing; use Generate or Complete"
            )
        published = await self._pins.pin(adapter, tenant)
        if published is None:
            raise InvalidArgumentError(
                "the request names no adapter; the base model has no head to classify with"
            )
        head = published.summary.config.head
        if head is None:
            raise FailedPreconditionError(
                f"adapter {published.name!r} has no classification head; put one that was trained "
                "with its head, or use Embed"
            )
        return published, head

    async def _submit(
        self,
        inputs: Sequence[ReadInput],
        published: Pinned | None,
        reading: Reading,
        tenant: str,
        priority: int = 0,
    ) -> list["_Call"]:
        self._validator.inputs(inputs, self._max_inputs)
        if self._model.kind != "encoder" and any(isinstance(i, TextPair) for i in inputs):
            raise InvalidArgumentError("pairs of texts are for encoders; join the two yourself")
        tenant = tenant or (published.name if published else "")
        encoded = await self._encode(inputs, tenant)
        loop = asyncio.get_running_loop()
        adapter = await self._pins.fetch(published) if published else None
        calls = []
        for (ids, num_added), type_ids in encoded:
            edited = await self._windows.positions(adapter, None, ids, tenant)
            future: asyncio.Future[Sequence[float]] = loop.create_future()
            request = Request(
                prompt_ids=ids,
                max_tokens=0,
                sampling=SamplingParams(),
                stop_token_ids=frozenset(),
                tenant=tenant,
                adapter=adapter,
                logprobs=False,
                sink=functools.partial(_answer, future),
                priority=priority,
                edited=edited,
                reading=dataclasses.replace(reading, type_ids=type_ids),
            )
            calls.append(_Call(request, future, num_added))
        self._engine.submit(*(call.request for call in calls))
        return calls

    async def _encode(
        self, inputs: Sequence[ReadInput], tenant: str
    ) -> list[tuple[Encoded, list[int] | None]]:
        """Returns of each input its ids, and which of two parts each of them belongs to."""
        found: list[tuple[Encoded, list[int] | None]] = []
        for some in portions(inputs, _num_chars):
            work = functools.partial(self._encode_some, some)
            encoded = await self._tokenizing.run(tenant, sum(map(_num_chars, some)), work)
            for index, (item, _) in enumerate(encoded, len(found)):
                self._validator.input_ids(index, item.ids)
            found += encoded
        return found

    def _encode_some(self, inputs: Sequence[ReadInput]) -> list[tuple[Encoded, list[int] | None]]:
        return [self._encode_one(item) for item in inputs]

    def _encode_one(self, item: ReadInput) -> tuple[Encoded, list[int] | None]:
        most = self._validator.max_context
        if isinstance(item, TextPair):
            return self._codec.encode_pair(item.first, item.second, most)
        if isinstance(item, str):
            return self._codec.encode_input(item, most), None
        return Encoded(list(item)), None

    async def _wait(self, calls: Sequence["_Call"]) -> list[Sequence[float]]:
        """Returns all values; one that fails, or the caller's going away, ends the others."""
        try:
            return await asyncio.gather(*(call.values for call in calls))
        finally:
            cancelled = RequestCancelledError("the request was cancelled")
            for call in calls:
                self._engine.end(call.request, Failed(cancelled))


class _Call(NamedTuple):
    request: Request
    values: asyncio.Future[Sequence[float]]
    num_added: int  # special tokens that no text asked for


def _answer(values: asyncio.Future[Sequence[float]], event: Event) -> None:
    """The sink of a request that brings one event, its end."""
    if values.done():  # cancelled
        return
    if isinstance(event, Failed):
        values.set_exception(event.error)
    else:
        assert isinstance(event, Read)
        values.set_result(event.values)


def _num_tokens(calls: Sequence[_Call]) -> int:
    return sum(len(call.request.prompt_ids) for call in calls)


def _num_added(calls: Sequence[_Call]) -> int:
    return sum(call.num_added for call in calls)


def _num_chars(item: ReadInput) -> int:
    if isinstance(item, TextPair):
        return len(item.first) + len(item.second)
    return len(item) if isinstance(item, str) else 0


def scores_of(logits: Sequence[float], problem_type: str) -> list[float]:
    """Returns softmax, sigmoid or the values themselves, as the problem type has it."""
    if problem_type == "single_label_classification":
        largest = max(logits)
        powers = [math.exp(x - largest) for x in logits]
        return [power / math.fsum(powers) for power in powers]
    if problem_type == "multi_label_classification":
        return [0.5 * (1 + math.tanh(x / 2)) for x in logits]
    return list(logits)
