"""The gRPC services: protobuf in, protobuf out, nothing else."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from redmux.errors import InvalidArgumentError
from redmux.v1 import admin_service_pb2 as admin_pb
from redmux.v1 import inference_service_pb2 as inference_pb
from redmux.v1.admin_service_pb2_grpc import AdminServiceServicer
from redmux.v1.inference_service_pb2_grpc import InferenceServiceServicer
from redmux_server.engine.request import Pooling
from redmux_server.grpc_api.call_keys import CallKeys
from redmux_server.grpc_api.converted import Converted
from redmux_server.grpc_api.generating import (
    ToolParsers,
    Whole,
    adapter_of,
    applied,
    fill_chunk,
    prompt_of,
    prompt_scores,
    spec_of,
    text_or_chat_of,
)
from redmux_server.services.generation import GenerationService, generates_nothing
from redmux_server.services.reading import Classifications, Embeddings, ReadingService
from redmux_server.services.scoring import ScoringService, TokenScores
from redmux_server.services.spec import ReadInput, ScoreSpec, TextPair, TokenizeSpec
from redmux_server.services.tokens import TokenService

_POOLINGS = {
    inference_pb.POOLING_UNSPECIFIED: None,
    inference_pb.POOLING_MEAN: Pooling.MEAN,
    inference_pb.POOLING_CLS: Pooling.CLS,
    inference_pb.POOLING_LAST: Pooling.LAST,
}
_PROBLEM_TYPES = {
    "single_label_classification": inference_pb.PROBLEM_TYPE_SINGLE_LABEL,
    "multi_label_classification": inference_pb.PROBLEM_TYPE_MULTI_LABEL,
    "regression": inference_pb.PROBLEM_TYPE_REGRESSION,
}


class InferenceServicer(InferenceServiceServicer):
    """Text generation, streamed or whole; what is read of given texts; tokens."""

    def __init__(
        self,
        generation: GenerationService | None,
        scoring: ScoringService | None,
        reading: ReadingService,
        tokens: TokenService,
        keys: CallKeys,
    ) -> None:
        """`generation` and `scoring` are None for a model that generates nothing."""
        self._generation = generation
        self._scoring = scoring
        self._reading = reading
        self._tokens = tokens
        self._keys = keys

    async def Generate(
        self, request: inference_pb.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb.GenerateResponse]:
        """Streams deltas, one message for all tokens that are ready.

        It is the same message object every time, so read it before asking for the next.
        """
        spec = spec_of(request.generation, context.time_remaining())
        generation, published = await self._generates().submit(spec, self._keys.tenant(context))
        message = inference_pb.GenerateResponse(adapter=applied(published))
        parsers, is_first = ToolParsers(generation), True
        async with contextlib.aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                scores = prompt_scores(generation) if is_first else None
                fill_chunk(message, delta, parsers, scores)
                is_first = False
                yield message

    async def Complete(
        self, request: inference_pb.CompleteRequest, context: Any
    ) -> inference_pb.CompleteResponse:
        """Returns the whole completion, or all choices of it."""
        spec = spec_of(request.generation, context.time_remaining())
        generation, published = await self._generates().submit(spec, self._keys.tenant(context))
        whole = Whole()
        async with contextlib.aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                whole.add(delta)
        return whole.response(generation, published)

    async def Score(
        self, request: inference_pb.ScoreRequest, context: Any
    ) -> inference_pb.ScoreResponse:
        """Returns the log-probabilities of continuations and of the prompt."""
        spec = ScoreSpec(
            prompt=prompt_of(request),
            continuations=Converted(request.continuations, _continuation),
            adapter=adapter_of(request),
            prompt_logprobs=request.prompt_logprobs,
            apply=request.apply if request.HasField("apply") else None,
        )
        scores = await self._scores().score(spec, self._keys.tenant(context))
        return inference_pb.ScoreResponse(
            continuations=[_token_scores(s) for s in scores.continuations],
            prompt=None if scores.prompt is None else _token_scores(scores.prompt),
            adapter=applied(scores.published),
            usage=inference_pb.Usage(
                prompt_tokens=scores.num_prompt_tokens,
                completion_tokens=sum(len(s.token_ids) for s in scores.continuations),
                cached_prompt_tokens=scores.num_cached_tokens,
                added_special_tokens=scores.num_added_tokens,
            ),
        )

    async def Classify(
        self, request: inference_pb.ClassifyRequest, context: Any
    ) -> inference_pb.ClassifyResponse:
        """Returns what an adapter's head makes of each input."""
        inputs = Converted(request.inputs, _input)
        done = await self._reading.classify(inputs, adapter_of(request), self._keys.tenant(context))
        return inference_pb.ClassifyResponse(
            classifications=[
                inference_pb.Classification(scores=scores, logits=logits)
                for scores, logits in zip(done.scores, done.logits, strict=True)
            ],
            labels=done.head.labels,
            problem_type=_PROBLEM_TYPES[done.head.problem_type],
            adapter=applied(done.published),
            usage=_usage_of_inputs(done),
        )

    async def Embed(
        self, request: inference_pb.EmbedRequest, context: Any
    ) -> inference_pb.EmbedResponse:
        """Returns a vector of each input."""
        if request.pooling not in _POOLINGS:
            raise InvalidArgumentError(f"pooling is {request.pooling}, which this server lacks")
        done = await self._reading.embed(
            Converted(request.inputs, _input),
            adapter_of(request),
            _POOLINGS[request.pooling],
            request.normalize,
            self._keys.tenant(context),
        )
        return inference_pb.EmbedResponse(
            embeddings=[inference_pb.Embedding(values=vector) for vector in done.vectors],
            adapter=applied(done.published),
            usage=_usage_of_inputs(done),
        )

    async def Tokenize(
        self, request: inference_pb.TokenizeRequest, context: Any
    ) -> inference_pb.TokenizeResponse:
        """Returns the tokens of a prompt."""
        is_said = request.HasField("add_special_tokens")
        spec = TokenizeSpec(
            text_or_chat_of(request),
            request.adapter,
            request.add_special_tokens if is_said else None,
        )
        found = await self._tokens.tokenize(spec, self._keys.tenant(context))
        return inference_pb.TokenizeResponse(
            token_ids=found.ids,
            token_texts=self._tokens.texts(found.ids) if request.token_texts else None,
            added_special_tokens=found.num_added,
            max_context=self._tokens.max_context,
            adapter=applied(found.published),
        )

    async def Detokenize(
        self, request: inference_pb.DetokenizeRequest, context: Any
    ) -> inference_pb.DetokenizeResponse:
        """Returns the text of tokens."""
        return inference_pb.DetokenizeResponse(text=self._tokens.detokenize(request.token_ids))

    def _generates(self) -> GenerationService:
        if self._generation is None:
            raise generates_nothing()
        return self._generation

    def _scores(self) -> ScoringService:
        if self._scoring is None:
            raise generates_nothing()
        return self._scoring


class AdminServicer(AdminServiceServicer):
    """What the server is."""

    def __init__(
        self, info: Callable[[str], Awaitable[admin_pb.ServerInfo]], keys: CallKeys
    ) -> None:
        """`info` returns what a tenant is told."""
        self._info = info
        self._keys = keys

    async def GetServerInfo(
        self, request: admin_pb.GetServerInfoRequest, context: Any
    ) -> admin_pb.GetServerInfoResponse:
        """Returns model, choices, limits and load."""
        info = await self._info(self._keys.tenant(context))
        return admin_pb.GetServerInfoResponse(info=info)


def _input(index: int, message: inference_pb.Input) -> ReadInput:
    form = message.WhichOneof("form")
    if form == "text":
        return message.text
    if form == "token_ids":
        return message.token_ids.ids
    if form == "pair":
        return TextPair(message.pair.first, message.pair.second)
    raise InvalidArgumentError(f"inputs[{index}] is empty; set text, token_ids or pair")


def _continuation(index: int, message: inference_pb.Continuation) -> str | Sequence[int]:
    form = message.WhichOneof("form")
    if form is None:
        raise InvalidArgumentError(f"continuations[{index}] is unset; set text or token_ids")
    return message.text if form == "text" else message.token_ids.ids


def _token_scores(scores: TokenScores) -> inference_pb.TokenScores:
    return inference_pb.TokenScores(
        token_ids=scores.token_ids, logprobs=scores.logprobs, is_greedy=scores.is_greedy
    )


def _usage_of_inputs(done: Embeddings | Classifications) -> inference_pb.Usage:
    return inference_pb.Usage(
        prompt_tokens=done.num_tokens, added_special_tokens=done.num_added_tokens
    )
