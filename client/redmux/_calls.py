"""Arguments to messages and messages to values: no I/O, shared by both clients."""

import operator
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC
from typing import Any, SupportsIndex, Unpack, cast

from redmux import _chats
from redmux._arguments import check_names, fill, put
from redmux._grammar import grammar
from redmux.errors import InvalidArgumentError, RedmuxError
from redmux.mixes import Mix
from redmux.types import (
    Adapter,
    AdapterAlias,
    ChatOptions,
    Chunk,
    Classification,
    Classifications,
    Completion,
    Continuation,
    Embeddings,
    FinishReason,
    GenerationOptions,
    Pooling,
    ProblemType,
    Prompt,
    PromptScores,
    Scores,
    TextInput,
    Tokens,
    TokenScores,
    ToolCallDelta,
    TopLogprobs,
    Usage,
)
from redmux.v1 import adapter_service_pb2
from redmux.v1 import inference_service_pb2 as inference_pb2

_FINISH_REASONS: dict[int, FinishReason] = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
}

_PROBLEM_TYPES: dict[int, ProblemType] = {
    inference_pb2.PROBLEM_TYPE_SINGLE_LABEL: "single_label",
    inference_pb2.PROBLEM_TYPE_MULTI_LABEL: "multi_label",
    inference_pb2.PROBLEM_TYPE_REGRESSION: "regression",
}
_POOLINGS = {
    "mean": inference_pb2.POOLING_MEAN,
    "cls": inference_pb2.POOLING_CLS,
    "last": inference_pb2.POOLING_LAST,
}
# Those of chats, which TypedDict has first, are told last.
_OPTIONS = (
    *(
        name
        for name in GenerationOptions.__annotations__
        if name not in ChatOptions.__annotations__
    ),
    *ChatOptions.__annotations__,
)
_OF_TOKENIZE = ("adapter", "add_special_tokens", "token_texts")

_MIX_METHODS = {
    "interpolate": inference_pb2.MIX_METHOD_INTERPOLATE,
    "compose": inference_pb2.MIX_METHOD_COMPOSE,
}


def generation(prompt: Prompt, **options: Unpack[GenerationOptions]) -> inference_pb2.Generation:
    """Returns the message for a request; ranges are the server's to check.

    Raises InvalidArgumentError, which names the argument, for what no message can hold, and
    TypeError for a name that is no argument.
    """
    check_names(options, _OPTIONS, "generate() or stream()")
    adapter = options.pop("adapter", None)
    _check_adapter(adapter)
    for name in ("stop", "bad_words"):
        texts = options.get(name)
        if isinstance(texts, str):
            raise InvalidArgumentError(f"{name} is a sequence of texts; write {name}=[{texts!r}]")
    parse_special_tokens = options.pop("parse_special_tokens", False)
    of_chat = {key: options.pop(key) for key in _chats.OPTIONS if key in options}  # type: ignore[misc]
    wanted = grammar(cast(dict[str, Any], options))
    message = inference_pb2.Generation(
        grammar=wanted, sampling=inference_pb2.Sampling(), stopping=inference_pb2.Stopping()
    )
    _put_biases(message.sampling, options.pop("logit_bias", {}))
    _put_adapter(message, adapter)
    parts = (message.sampling, message.stopping, message)
    for name, value in options.items():
        part = next(part for part in parts if name in part.DESCRIPTOR.fields_by_name)
        if value is not None:
            put(part, name, value, name)
    _set_prompt(message, prompt, parse_special_tokens, of_chat)
    return message


def _put_biases(message: inference_pb2.Sampling, biases: Mapping[int, float]) -> None:
    try:
        for token_id, bias in biases.items():
            message.logit_bias[operator.index(token_id)] = bias
    except (AttributeError, TypeError, ValueError):
        raise InvalidArgumentError(
            f"logit_bias is {reprlib.repr(biases)}, must be a mapping from token ids to numbers"
        ) from None


def score_request(
    prompt: Prompt,
    continuations: Sequence[Continuation],
    *,
    adapter: str | Mix | None,
    prompt_logprobs: bool,
    apply: str | None,
    parse_special_tokens: bool,
) -> inference_pb2.ScoreRequest:
    """Returns the message that asks for scores.

    Raises InvalidArgumentError, which names the argument, for what no message can hold.
    """
    _check_adapter(adapter)
    if isinstance(continuations, str):
        raise InvalidArgumentError(
            f"continuations is a sequence; write continuations=[{continuations!r}]"
        )
    if not isinstance(continuations, Iterable):
        raise InvalidArgumentError(
            f"continuations is {type(continuations).__name__}; give a list of texts or of lists "
            "of token ids"
        )
    message = inference_pb2.ScoreRequest()
    fill(message, prompt_logprobs=prompt_logprobs, apply=apply)
    _put_adapter(message, adapter)
    _set_prompt(message, prompt, parse_special_tokens)
    for index, given in enumerate(continuations):
        added = message.continuations.add()
        if isinstance(given, str):
            added.text = given
        else:
            put(added.token_ids, "ids", given, f"continuations[{index}]")
            added.token_ids.SetInParent()
    return message


def tokenize_request(
    prompt: str | Sequence[Mapping[str, Any]],
    adapter: str | None,
    add_special_tokens: bool | None,
    token_texts: bool,
    of_chat: Mapping[str, Any],
) -> inference_pb2.TokenizeRequest:
    """Returns the message that asks for tokens; raises as `generation` does."""
    check_names(of_chat, (*ChatOptions.__annotations__, *_OF_TOKENIZE), "tokenize()")
    _check_adapter(adapter)
    message = inference_pb2.TokenizeRequest()
    fill(
        message, adapter=adapter, add_special_tokens=add_special_tokens, token_texts=token_texts
    )  # fmt: skip
    if not isinstance(prompt, str) and isinstance(prompt, Sequence) and _are_token_ids(prompt):
        raise InvalidArgumentError(
            "prompt is a text or a sequence of chat messages; token ids are tokens already"
        )
    options = dict(of_chat)
    parse_special_tokens = options.pop("parse_special_tokens", False)
    _set_prompt(message, prompt, parse_special_tokens, options)
    return message


def detokenize_request(token_ids: Sequence[int]) -> inference_pb2.DetokenizeRequest:
    """Returns the message that asks for the text of tokens; raises as `generation` does."""
    message = inference_pb2.DetokenizeRequest()
    put(message, "token_ids", token_ids, "token_ids")
    return message


def _check_adapter(adapter: str | Mix | None) -> None:
    if adapter == "":
        raise InvalidArgumentError("adapter is empty; leave it out for the base model")


def _put_adapter(
    message: inference_pb2.Generation
    | inference_pb2.ScoreRequest
    | inference_pb2.ClassifyRequest
    | inference_pb2.EmbedRequest,
    adapter: str | Mix | None,
) -> None:
    if not isinstance(adapter, Mix):
        fill(message, adapter=adapter)
        return
    message.mix.how = _MIX_METHODS[adapter.how]
    message.mix.strength = adapter.strength
    message.mix.prompt_from = adapter.prompt_from or ""
    for part in adapter.parts:
        message.mix.parts.add(adapter=part.adapter, weight=part.weight, layers=part.layers)


def _set_prompt(
    message: inference_pb2.Generation | inference_pb2.ScoreRequest | inference_pb2.TokenizeRequest,
    prompt: Prompt,
    parse_special_tokens: bool,
    of_chat: Mapping[str, object] | None = None,
) -> None:
    is_chat = isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)
    for name, value in (of_chat or {}).items():
        if not is_chat and value not in (None, False):
            raise InvalidArgumentError(f"{name} is for chats; give the prompt as chat messages")
    if isinstance(prompt, str):
        put(message, "text", prompt, "prompt")  # which has to be valid Unicode
        return
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
        raise InvalidArgumentError(
            f"prompt is a text, a sequence of token ids or a sequence of chat messages, "
            f"not {type(prompt).__name__}"
        )
    if prompt and all(isinstance(item, Mapping) for item in prompt):
        message.chat.CopyFrom(
            _chats.chat(cast(Sequence[Mapping[str, object]], prompt), of_chat or {})
        )
        put(message.chat, "parse_special_tokens", parse_special_tokens, "parse_special_tokens")
        return
    if prompt and all(isinstance(item, str) for item in prompt):
        raise InvalidArgumentError(
            "prompt is a list of texts; one call takes one prompt, so make a call for each"
        )
    if not _are_token_ids(prompt):
        raise InvalidArgumentError("prompt mixes token ids or chat messages with something else")
    assert not isinstance(message, inference_pb2.TokenizeRequest)  # whose callers refuse ids
    _put_token_ids(message.token_ids, cast(Sequence[int], prompt), "prompt")


def _are_token_ids(items: Sequence[object]) -> bool:
    # NumPy's integers count as ints; bool does so in Python, but never as a token id.
    return all(isinstance(item, SupportsIndex) and not isinstance(item, bool) for item in items)


def _put_token_ids(message: inference_pb2.TokenIds, ids: Sequence[int], name: str) -> None:
    message.SetInParent()
    put(message, "ids", [operator.index(item) for item in ids], name)


def classify_request(
    inputs: Sequence[TextInput], adapter: str | Mix
) -> inference_pb2.ClassifyRequest:
    """Returns the message that classifies inputs; raises as `generation` does."""
    if not isinstance(adapter, str | Mix) or not adapter:
        raise InvalidArgumentError(
            f"adapter is {adapter!r}; name a loaded adapter that has a classification head"
        )
    request = inference_pb2.ClassifyRequest(inputs=_inputs(inputs))
    _put_adapter(request, adapter)
    return request


def embed_request(
    inputs: Sequence[TextInput],
    adapter: str | Mix | None,
    pooling: Pooling | None,
    normalize: bool,
) -> inference_pb2.EmbedRequest:
    """Returns the message that embeds inputs; raises as `generation` does."""
    _check_adapter(adapter)
    if pooling is not None and pooling not in _POOLINGS:
        raise InvalidArgumentError(f"pooling is {pooling!r}; use one of {', '.join(_POOLINGS)}")
    request = inference_pb2.EmbedRequest(
        inputs=_inputs(inputs), pooling=None if pooling is None else _POOLINGS[pooling]
    )
    fill(request, normalize=normalize)
    _put_adapter(request, adapter)
    return request


def _inputs(inputs: Sequence[TextInput]) -> list[inference_pb2.Input]:
    if isinstance(inputs, str):
        raise InvalidArgumentError("inputs is a sequence of inputs; write [text] for one text")
    if not isinstance(inputs, Iterable):
        raise InvalidArgumentError(f"inputs is {type(inputs).__name__}; give a list of inputs")
    return [_input(index, item) for index, item in enumerate(inputs)]


def _input(index: int, item: TextInput) -> inference_pb2.Input:
    if isinstance(item, str):
        return inference_pb2.Input(text=item)
    if isinstance(item, Sequence) and not isinstance(item, bytes | bytearray | memoryview):
        if len(item) == 2 and all(isinstance(text, str) for text in item):
            first, second = cast(tuple[str, str], item)
            return inference_pb2.Input(pair=inference_pb2.TextPair(first=first, second=second))
        if _are_token_ids(item):
            message = inference_pb2.Input()
            _put_token_ids(message.token_ids, cast(Sequence[int], item), f"inputs[{index}]")
            return message
    raise InvalidArgumentError(
        f"inputs[{index}] is {type(item).__name__}; an input is a text, a sequence of token ids or "
        f"a pair of texts"
    )


def chat_message(message: Mapping[str, str], place: str = "") -> inference_pb2.ChatMessage:
    """Returns the message of one turn of a training record, which has a role and a content.

    Raises InvalidArgumentError for other keys and kinds.

    `place` begins what the error says.
    """
    if set(message) != {"role", "content"}:
        raise InvalidArgumentError(
            f"{place}a chat message has the keys 'role' and 'content', "
            f"not {sorted(map(str, message))}"
        )
    turn = inference_pb2.ChatMessage()
    for key in ("role", "content"):
        put(turn, key, message[key], f"{place}{key}")
    return turn


def put_request(
    name: str, safetensors: bytes, config_json: str, replace: bool
) -> adapter_service_pb2.PutAdapterRequest:
    """Returns the message that publishes an adapter."""
    request = adapter_service_pb2.PutAdapterRequest(
        name=check_name(name), safetensors=safetensors, config_json=config_json
    )
    fill(request, replace=replace)
    return request


def alias_request(name: str, alias: str, version: int | str) -> adapter_service_pb2.SetAliasRequest:
    """Returns the message that points an alias at a version."""
    if not isinstance(version, int | str):
        raise InvalidArgumentError(f"a version is a number or text, not {type(version).__name__}")
    return adapter_service_pb2.SetAliasRequest(
        name=check_name(name), alias=alias, version=str(version)
    )


def check_name(name: str) -> str:
    """Returns the name; raises InvalidArgumentError if it is no text."""
    if not isinstance(name, str):
        raise InvalidArgumentError(f"an adapter's name is a text, not {type(name).__name__}")
    return name


def completion(message: inference_pb2.CompleteResponse, with_logprobs: bool) -> Completion:
    """Returns the value of a whole completion, with its other choices."""

    def choice(
        message: inference_pb2.CompleteResponse | inference_pb2.Choice,
        prompt: PromptScores | None = None,
        others: tuple[Completion, ...] = (),
    ) -> Completion:
        return Completion(
            text=message.text,
            token_ids=tuple(message.token_ids),
            logprobs=tuple(message.logprobs) if with_logprobs else None,
            finish_reason=_finish_reason(message.finish),
            stop=message.finish.stop or None,
            usage=_usage(message.finish.usage),
            adapter=adapter,
            digest=digest,
            top_logprobs=_top(message.top_logprobs) or None,
            stop_token_id=_optional(message.finish, "stop_token_id"),
            prompt=prompt,
            first_token_s=_optional(message.finish, "first_token_s"),
            total_s=message.finish.total_s,
            other_choices=others,
            tool_calls=tuple(map(_chats.tool_call, message.tool_calls)),
        )

    adapter, digest = message.adapter.name or None, message.adapter.digest or None
    return choice(message, _prompt_scores(message), tuple(map(choice, message.other_choices)))


def _prompt_scores(
    message: inference_pb2.CompleteResponse | inference_pb2.GenerateResponse,
) -> PromptScores | None:
    if not message.HasField("prompt"):
        return None
    prompt = message.prompt
    return PromptScores(tuple(prompt.token_ids), tuple(prompt.logprobs), _top(prompt.top_logprobs))


def _top(messages: Iterable[inference_pb2.TopLogprobs]) -> tuple[TopLogprobs, ...]:
    return tuple(tuple(zip(m.token_ids, m.logprobs, strict=True)) for m in messages)


def _optional(message: inference_pb2.Finish, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def scores(message: inference_pb2.ScoreResponse) -> Scores:
    """Returns the value of a scoring."""
    return Scores(
        continuations=tuple(map(_token_scores, message.continuations)),
        prompt=_token_scores(message.prompt) if message.HasField("prompt") else None,
        usage=_usage(message.usage),
        adapter=message.adapter.name or None,
        digest=message.adapter.digest or None,
    )


def tokens(message: inference_pb2.TokenizeResponse, with_texts: bool) -> Tokens:
    """Returns the value of the tokens of a prompt."""
    return Tokens(
        token_ids=tuple(message.token_ids),
        token_texts=tuple(message.token_texts) if with_texts else None,
        added_special_tokens=message.added_special_tokens,
        max_context=message.max_context,
        adapter=message.adapter.name or None,
        digest=message.adapter.digest or None,
    )


def _token_scores(message: inference_pb2.TokenScores) -> TokenScores:
    return TokenScores(tuple(message.token_ids), tuple(message.logprobs), tuple(message.is_greedy))


def chunk(message: inference_pb2.GenerateResponse, with_logprobs: bool) -> Chunk:
    """Returns the value of one message of a stream."""
    is_last = message.HasField("finish")
    return Chunk(
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(message.logprobs) if with_logprobs else None,
        adapter=message.adapter.name or None,
        digest=message.adapter.digest or None,
        finish_reason=_finish_reason(message.finish) if is_last else None,
        stop=message.finish.stop or None,
        usage=_usage(message.finish.usage) if is_last else None,
        tool_calls=tuple(
            ToolCallDelta(call.index, call.id, call.name, call.arguments)
            for call in message.tool_calls
        ),
        index=message.index,
        top_logprobs=_top(message.top_logprobs) or None,
        stop_token_id=_optional(message.finish, "stop_token_id"),
        prompt=_prompt_scores(message),
        first_token_s=_optional(message.finish, "first_token_s"),
        total_s=message.finish.total_s if is_last else None,
    )


def classifications(message: inference_pb2.ClassifyResponse) -> Classifications:
    """Returns the value of all classifications of a request."""
    problem_type = _PROBLEM_TYPES.get(message.problem_type)
    if problem_type is None:
        raise RedmuxError(
            f"the head's problem type is unknown to this client ({message.problem_type}); a newer "
            "redmux may know it"
        )
    labels = tuple(message.labels)
    return Classifications(
        results=tuple(
            Classification(labels, tuple(item.scores), tuple(item.logits))
            for item in message.classifications
        ),
        labels=labels,
        problem_type=problem_type,
        usage=_usage(message.usage),
        adapter=message.adapter.name,
        digest=message.adapter.digest,
    )


def embeddings(message: inference_pb2.EmbedResponse) -> Embeddings:
    """Returns the value of all vectors of a request."""
    return Embeddings(
        vectors=tuple(tuple(item.values) for item in message.embeddings),
        usage=_usage(message.usage),
        adapter=message.adapter.name or None,
        digest=message.adapter.digest or None,
    )


def _finish_reason(finish: inference_pb2.Finish) -> FinishReason:
    try:
        return _FINISH_REASONS[finish.reason]
    except KeyError:
        raise RedmuxError(
            f"the completion ended for a reason unknown to this client ({finish.reason}); "
            "a newer redmux may know it"
        ) from None


def _usage(usage: inference_pb2.Usage) -> Usage:
    return Usage(
        usage.prompt_tokens, usage.completion_tokens, usage.cached_prompt_tokens,
        usage.added_special_tokens,
    )  # fmt: skip


def unfinished() -> RedmuxError:
    """Returns the error of a stream that ended well, but without its last message."""
    return RedmuxError("the stream ended before the completion did")


def adapter(message: adapter_service_pb2.Adapter) -> Adapter:
    """Returns the value of an adapter, with its time in UTC."""
    return Adapter(
        name=message.name,
        digest=message.digest,
        base_fingerprint=message.base_fingerprint,
        num_sites=message.num_sites,
        num_parameters=message.num_parameters,
        size_bytes=message.size_bytes,
        description=message.description,
        created_at=message.created_at.ToDatetime(tzinfo=UTC),
        base_match=message.base_match,
        apply=message.apply,
        version=message.version,
        aliases=tuple(AdapterAlias(alias.name, alias.version) for alias in message.aliases),
    )
