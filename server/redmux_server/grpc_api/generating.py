"""Messages of generation and scoring to what the services take, and back."""

import json
from collections.abc import Sequence
from typing import Any

from redmux.errors import InvalidArgumentError
from redmux.mixes import How, Mix, MixPart, check_num_parts
from redmux.v1 import inference_service_pb2 as inference_pb
from redmux_server.engine.request import FinishReason
from redmux_server.grpc_api.chats import chat_of, tool_calls_of
from redmux_server.services.choice import Delta, Finish
from redmux_server.services.generation import Generation
from redmux_server.services.grammar_source import check_num_choices
from redmux_server.services.pinning import Pinned
from redmux_server.services.spec import (
    AdapterRef,
    Chat,
    GenerationSpec,
    Grammar,
    GrammarKind,
    Prompt,
)
from redmux_server.services.tools import ToolCallDelta, ToolCallParser, whole_calls

_REASONS = {
    FinishReason.STOP: inference_pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb.FINISH_REASON_LENGTH,
}

_HOWS: dict[int, How] = {
    inference_pb.MIX_METHOD_UNSPECIFIED: "interpolate",
    inference_pb.MIX_METHOD_INTERPOLATE: "interpolate",
    inference_pb.MIX_METHOD_COMPOSE: "compose",
}


def spec_of(message: inference_pb.Generation, remaining_s: float | None) -> GenerationSpec:
    """Returns what a message asks for; `remaining_s` is what is left of its call's time."""
    sampling, stopping = message.sampling, message.stopping

    def optional(part: Any, name: str) -> Any:
        return getattr(part, name) if part.HasField(name) else None

    return GenerationSpec(
        prompt=prompt_of(message),
        adapter=adapter_of(message),
        temperature=optional(sampling, "temperature"),
        top_p=optional(sampling, "top_p"),
        top_k=optional(sampling, "top_k"),
        min_p=optional(sampling, "min_p"),
        typical_p=optional(sampling, "typical_p"),
        presence_penalty=optional(sampling, "presence_penalty"),
        frequency_penalty=optional(sampling, "frequency_penalty"),
        repetition_penalty=optional(sampling, "repetition_penalty"),
        no_repeat_ngram=optional(sampling, "no_repeat_ngram"),
        logit_bias=sampling.logit_bias,
        allowed_token_ids=sampling.allowed_token_ids,
        bad_words=sampling.bad_words,
        bad_token_ids=sampling.bad_token_ids,
        n=optional(sampling, "n"),
        seed=optional(sampling, "seed"),
        max_tokens=optional(stopping, "max_tokens"),
        min_tokens=optional(stopping, "min_tokens"),
        stop=stopping.stop,
        stop_token_ids=stopping.stop_token_ids,
        stop_regex=optional(stopping, "stop_regex"),
        ignore_eos=stopping.ignore_eos,
        include_stop_str=stopping.include_stop_str,
        logprobs=message.logprobs,
        top_logprobs=optional(message, "top_logprobs"),
        prompt_logprobs=optional(message, "prompt_logprobs"),
        skip_special_tokens=optional(message, "skip_special_tokens") is not False,
        grammar=_grammar(message.grammar) if message.HasField("grammar") else None,
        priority=message.priority,
        apply=optional(message, "apply"),
        # A call whose time is up is cancelled by gRPC, whatever becomes of it here.
        timeout_s=None if remaining_s is None else max(remaining_s, 1e-3),
    )


def adapter_of(
    message: inference_pb.Generation
    | inference_pb.ScoreRequest
    | inference_pb.ClassifyRequest
    | inference_pb.EmbedRequest,
) -> AdapterRef:
    """Returns the adapter or the mix that a message names; raises InvalidArgumentError for both."""
    if not message.HasField("mix"):
        return message.adapter
    if message.adapter:
        raise InvalidArgumentError(
            f"the request names the adapter {message.adapter[:80]!r} and a mix; give one of them"
        )
    mix = message.mix
    check_num_parts(len(mix.parts))
    if mix.how not in _HOWS:
        raise InvalidArgumentError(f"how is {mix.how}, which this server lacks")
    return Mix(
        [
            MixPart(
                part.adapter, part.weight if part.HasField("weight") else 1.0, part.layers or None
            )
            for part in mix.parts
        ],
        _HOWS[mix.how],
        mix.strength if mix.HasField("strength") else 1.0,
        mix.prompt_from or None,
    )


def _grammar(message: inference_pb.Grammar) -> Grammar | None:
    form = message.WhichOneof("kind")
    if form == "json_object":
        return Grammar(GrammarKind.JSON_OBJECT) if message.json_object else None
    if form == "choices":
        texts = message.choices.texts
        check_num_choices(len(texts))
        return Grammar(GrammarKind.CHOICE, json.dumps(list(texts), ensure_ascii=False))
    if form is None:
        raise InvalidArgumentError(
            "the grammar is empty; set json_schema, json_object, regex, choices or lark"
        )
    return Grammar(GrammarKind(form), getattr(message, form))


def prompt_of(message: inference_pb.Generation | inference_pb.ScoreRequest) -> Prompt:
    """Returns the prompt of a message; raises InvalidArgumentError where there is none."""
    form = message.WhichOneof("prompt")
    if form == "text":
        return message.text
    if form == "token_ids":
        return message.token_ids.ids
    if form == "chat":
        return chat_of(message.chat)
    raise InvalidArgumentError("the request has no prompt; set text, token_ids or chat")


def text_or_chat_of(message: inference_pb.TokenizeRequest) -> str | Chat:
    """Returns what is to be tokenized; raises InvalidArgumentError where there is nothing."""
    form = message.WhichOneof("prompt")
    if form is None:
        raise InvalidArgumentError("the request has no prompt; set text or chat")
    return message.text if form == "text" else chat_of(message.chat)


class ToolParsers:
    """What finds the calls of tools in the texts of a generation, choice by choice."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._parsers: dict[int, ToolCallParser | None] = {}

    def push(self, delta: Delta) -> tuple[str, list[ToolCallDelta]]:
        """Returns what of a choice's next delta is text, and what belongs to calls."""
        if delta.index not in self._parsers:
            self._parsers[delta.index] = self._generation.tool_parser()
        parser = self._parsers[delta.index]
        if parser is None:
            return delta.text, []
        return parser.push(delta.text, is_last=delta.finish is not None)


def fill_chunk(
    message: inference_pb.GenerateResponse,
    delta: Delta,
    parsers: ToolParsers,
    prompt: inference_pb.PromptScores | None,
) -> None:
    """Makes a message that of a delta, whatever it held but the adapter."""
    message.text, calls = parsers.push(delta)
    del message.tool_calls[:]
    message.tool_calls.extend(tool_calls_of(calls))
    message.token_ids[:] = delta.token_ids
    message.logprobs[:] = delta.logprobs
    message.index = delta.index
    del message.top_logprobs[:]
    message.top_logprobs.extend(_top(delta.top_logprobs))
    message.ClearField("prompt")
    if prompt is not None:
        message.prompt.CopyFrom(prompt)
    message.ClearField("finish")
    if delta.finish is not None:
        message.finish.CopyFrom(_finish(delta.finish))


class Whole:
    """The deltas of a generation, joined into its choices."""

    def __init__(self) -> None:
        self._choices: dict[int, Delta] = {}

    def add(self, delta: Delta) -> None:
        """Adds the next delta."""
        self._choices.setdefault(delta.index, Delta(delta.index)).add(delta)

    def response(
        self, generation: Generation, published: Pinned | None
    ) -> inference_pb.CompleteResponse:
        """Returns the message of all choices; every one of them has its finish."""
        parsers = ToolParsers(generation)
        first, *others = (
            _choice(self._choices[index], *parsers.push(self._choices[index]))
            for index in sorted(self._choices)
        )
        return inference_pb.CompleteResponse(
            text=first.text,
            token_ids=first.token_ids,
            logprobs=first.logprobs,
            top_logprobs=first.top_logprobs,
            tool_calls=first.tool_calls,
            finish=first.finish,
            adapter=applied(published),
            prompt=prompt_scores(generation),
            other_choices=others,
        )


def prompt_scores(generation: Generation) -> inference_pb.PromptScores | None:
    """Returns the scores of the prompt, without its first token, if they were asked for."""
    scores = generation.prompt_scores
    if scores is None:
        return None
    return inference_pb.PromptScores(
        token_ids=generation.prompt_ids[1:],
        logprobs=scores.known,
        top_logprobs=_top(scores.top[1:]),
    )


def applied(published: Pinned | None) -> inference_pb.AppliedAdapter:
    """Returns what names the adapter that something was computed with."""
    if published is None:
        return inference_pb.AppliedAdapter()
    return inference_pb.AppliedAdapter(name=published.name, digest=published.digest)


def _choice(delta: Delta, text: str, calls: list[ToolCallDelta]) -> inference_pb.Choice:
    assert delta.finish is not None
    return inference_pb.Choice(
        text=text,
        tool_calls=tool_calls_of(whole_calls(calls)),
        token_ids=delta.token_ids,
        logprobs=delta.logprobs,
        top_logprobs=_top(delta.top_logprobs),
        finish=_finish(delta.finish),
    )


def _top(top: Sequence[Sequence[tuple[int, float]]]) -> list[inference_pb.TopLogprobs]:
    if not any(top):
        return []
    return [
        inference_pb.TopLogprobs(
            token_ids=[token_id for token_id, _ in of_token],
            logprobs=[logprob for _, logprob in of_token],
        )
        for of_token in top
    ]


def _finish(finish: Finish) -> inference_pb.Finish:
    return inference_pb.Finish(
        reason=_REASONS[finish.reason],
        stop=finish.stop,
        usage=inference_pb.Usage(
            prompt_tokens=finish.num_prompt_tokens,
            completion_tokens=finish.num_completion_tokens,
            cached_prompt_tokens=finish.num_cached_tokens,
            added_special_tokens=finish.num_added_tokens,
        ),
        stop_token_id=finish.stop_token_id,
        first_token_s=finish.first_token_s,
        total_s=finish.total_s,
    )
