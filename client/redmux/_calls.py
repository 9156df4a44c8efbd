"""Arguments to messages and messages to values: no I/O, shared by both clients."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC
from typing import SupportsIndex, Unpack, cast

from redmux._arguments import check_names, fill, put
from redmux.errors import InvalidArgumentError, RedmuxError
from redmux.types import (
    Adapter,
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
    Scores,
    TextInput,
    TokenScores,
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


def generation(prompt: Prompt, **options: Unpack[GenerationOptions]) -> inference_pb2.Generation:
    """Returns the message for a request; ranges are the server's to check.

    Raises InvalidArgumentError, which names the argument, for what no message can hold, and
    TypeError for a name that is no argument.
    """
    check_names(options, GenerationOptions.__annotations__, "generate() or stream()")
    _check_adapter(options.get("adapter"))
    stop = options.get("stop")
    if isinstance(stop, str):
        raise InvalidArgumentError(f"stop is a sequence of texts; write stop=[{stop!r}]")
    parse_special_tokens = options.pop("parse_special_tokens", False)
    message = inference_pb2.Generation(
        sampling=inference_pb2.Sampling(), stopping=inference_pb2.Stopping()
    )
    parts = (message.sampling, message.stopping, message)
    for name, value in options.items():
        part = next(part for part in parts if name in part.DESCRIPTOR.fields_by_name)
        if value is not None:
            put(part, name, value, name)
    _set_prompt(message, prompt, parse_special_tokens)
    return message


def score_request(
    prompt: Prompt,
    continuations: Sequence[Continuation],
    *,
    adapter: str | None,
    prompt_logprobs: bool,
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
    fill(message, adapter=adapter, prompt_logprobs=prompt_logprobs)
    _set_prompt(message, prompt, parse_special_tokens)
    for index, given in enumerate(continuations):
        added = message.continuations.add()
        if isinstance(given, str):
            added.text = given
        else:
            put(added.token_ids, "ids", given, f"continuations[{index}]")
            added.token_ids.SetInParent()
    return message


def _check_adapter(adapter: str | None) -> None:
    if adapter == "":
        raise InvalidArgumentError("adapter is empty; leave it out for the base model")


def _set_prompt(
    message: inference_pb2.Generation | inference_pb2.ScoreRequest,
    prompt: Prompt,
    parse_special_tokens: bool,
) -> None:
    if isinstance(prompt, str):
        put(message, "text", prompt, "prompt")  # which has to be valid Unicode
        return
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
        raise InvalidArgumentError(
            f"prompt is a text, a sequence of token ids or a sequence of chat messages, "
            f"not {type(prompt).__name__}"
        )
    if prompt and all(isinstance(item, Mapping) for item in prompt):
        messages = [
            chat_message(item, f"prompt[{index}]: ")
            for index, item in enumerate(cast(Sequence[Mapping[str, str]], prompt))
        ]
        message.chat.CopyFrom(inference_pb2.Chat(messages=messages))
        put(message.chat, "parse_special_tokens", parse_special_tokens, "parse_special_tokens")
        return
    if prompt and all(isinstance(item, str) for item in prompt):
        raise InvalidArgumentError(
            "prompt is a list of texts; one call takes one prompt, so make a call for each"
        )
    if not _are_token_ids(prompt):
        raise InvalidArgumentError("prompt mixes token ids or chat messages with something else")
    _put_token_ids(message.token_ids, cast(Sequence[int], prompt), "prompt")


def _are_token_ids(items: Sequence[object]) -> bool:
    # NumPy's integers count as ints; bool does so in Python, but never as a token id.
    return all(isinstance(item, SupportsIndex) and not isinstance(item, bool) for item in items)


def _put_token_ids(message: inference_pb2.TokenIds, ids: Sequence[int], name: str) -> None:
    message.SetInParent()
    put(message, "ids", [operator.index(item) for item in ids], name)


def classify_request(inputs: Sequence[TextInput], adapter: str) -> inference_pb2.ClassifyRequest:
    """Returns the message that classifies inputs; raises as `generation` does."""
    if not isinstance(adapter, str) or not adapter:
        raise InvalidArgumentError(
            f"adapter is {adapter!r}; name a loaded adapter that has a classification head"
        )
    return inference_pb2.ClassifyRequest(adapter=adapter, inputs=_inputs(inputs))


def embed_request(
    inputs: Sequence[TextInput], adapter: str | None, pooling: Pooling | None, normalize: bool
) -> inference_pb2.EmbedRequest:
    """Returns the message that embeds inputs; raises as `generation` does."""
    _check_adapter(adapter)
    if pooling is not None and pooling not in _POOLINGS:
        raise InvalidArgumentError(f"pooling is {pooling!r}; use one of {', '.join(_POOLINGS)}")
    request = inference_pb2.EmbedRequest(
        inputs=_inputs(inputs), pooling=None if pooling is None else _POOLINGS[pooling]
    )
    fill(request, adapter=adapter, normalize=normalize)
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
    """Returns the message of one turn; raises InvalidArgumentError for other keys and kinds.

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


def check_name(name: str) -> str:
    """Returns the name; raises InvalidArgumentError if it is no text."""
    if not isinstance(name, str):
        raise InvalidArgumentError(f"an adapter's name is a text, not {type(name).__name__}")
    return name


def completion(message: inference_pb2.CompleteResponse, with_logprobs: bool) -> Completion:
    """Returns the value of a whole completion."""
    return Completion(
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(message.logprobs) if with_logprobs else None,
        finish_reason=_finish_reason(message.finish),
        stop=message.finish.stop or None,
        usage=_usage(message.finish.usage),
        adapter=message.adapter.name or None,
        digest=message.adapter.digest or None,
    )


def scores(message: inference_pb2.ScoreResponse) -> Scores:
    """Returns the value of a scoring."""
    return Scores(
        continuations=tuple(map(_token_scores, message.continuations)),
        prompt=_token_scores(message.prompt) if message.HasField("prompt") else None,
        usage=_usage(message.usage),
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
    )
