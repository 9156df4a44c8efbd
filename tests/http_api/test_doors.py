"""One request through every door: what it asks the services for is the same, field by field.

The Python client is what asks over gRPC, so its arguments are compared as well.
"""

import dataclasses
import json
import runpy
from pathlib import Path

import pytest

from redmux import InvalidArgumentError, Mix, MixPart, _calls
from redmux.types import GenerationOptions, ToolCall
from redmux.v1 import inference_service_pb2 as pb
from redmux_adapters import to_bytes
from redmux_adapters.text.messages import _KEYS as MESSAGE_KEYS
from redmux_adapters.text.messages import normal
from redmux_server.http_api.schemas.chat import ChatBody
from redmux_server.http_api.schemas.completion import CompletionBody
from redmux_server.http_api.schemas.tokens import TokenizeBody
from redmux_server.registry.published import Published
from redmux_server.services.chat import _KINDS as FUNCTION_KEYS
from redmux_server.services.chat import options_of
from redmux_server.services.generation import GenerationService
from redmux_server.services.spec import Chat
from redmux_server.services.tokens import TokenService

ROOT = Path(__file__).parents[2]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TURN = {"role": "user", "content": "a"}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": FUNCTION}]
PARTS = [{"type": "text", "text": "s"}, {"type": "text", "text": "t"}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}

# Prompt and arguments of the client; what the body of /v1/completions has for it.
TEXTS = [
    ("a", {}, {"prompt": "a"}),
    ([1, 2], {}, {"prompt": [1, 2]}),
    ("a", {"logprobs": True, "top_logprobs": 0}, {"prompt": "a", "logprobs": 0}),
    ("a", {"prompt_logprobs": 2}, {"prompt": "a", "prompt_logprobs": 2}),
]
# Arguments of the client; fields of the bodies of completions and of chats.
OPTIONS = [
    *(({name: value}, {name: value}) for name, value in {
        "temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.25, "typical_p": 0.75,
        "presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.5, "n": 2,
        "seed": 7, "min_tokens": 3, "stop_regex": "a+", "ignore_eos": True,
        "skip_special_tokens": False, "priority": -1, "allowed_token_ids": [1],
        "bad_words": ["x"], "bad_token_ids": [2], "stop_token_ids": [3], "max_tokens": 4,
        "stop": ["a"],
    }.items()),
    ({"adapter": "one"}, {"model": "one"}),
    ({"adapter": Mix([MixPart("one", 0.5, [0, 2]), MixPart("b")], "compose", 2, "b")},
     {"mix": {"parts": [{"adapter": "one", "weight": 0.5, "layers": [0, 2]}, {"adapter": "b"}],
              "how": "compose", "strength": 2, "prompt_from": "b"}}),
    ({"apply": "prompt", "adapter": "one"}, {"apply": "prompt", "model": "one"}),
    ({"no_repeat_ngram": 3}, {"no_repeat_ngram_size": 3}),
    ({"logit_bias": {50: -2.5}}, {"logit_bias": {"50": -2.5}}),
    ({"include_stop_str": True}, {"include_stop_str_in_output": True}),
    ({"schema": SCHEMA}, {"guided_json": SCHEMA}),
    ({"schema": SCHEMA}, {"structured_outputs": {"json": SCHEMA}}),
    ({"json_object": True}, {"response_format": {"type": "json_object"}}),
    ({"regex": "a+"}, {"guided_regex": "a+"}),
    ({"choices": ["a", "b"]}, {"guided_choice": ["a", "b"]}),
    ({"grammar": "start: x"}, {"guided_grammar": "start: x"}),
]  # fmt: skip
# Arguments of the client; fields of the body of a chat.
OF_CHAT = [
    ({"logprobs": True, "top_logprobs": 2}, {"logprobs": True, "top_logprobs": 2}),
    ({"max_tokens": 5}, {"max_completion_tokens": 5}),
    ({"parse_special_tokens": True}, {"parse_special_tokens": True}),
    ({"template": "t"}, {"chat_template": "t"}),
    ({"template_args": {"k": 1}}, {"chat_template_kwargs": {"k": 1}}),
    ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
    ({"continue_final_message": True}, {"continue_final_message": True}),
    ({"tools": TOOLS}, {"tools": TOOLS}),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]},
     {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    ({"tools": TOOLS, "tool_choice": "none"}, {"tools": TOOLS, "tool_choice": "none"}),
    ({"tools": TOOLS, "tool_choice": "f"},
     {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}),
    ({"tools": TOOLS, "parallel_tool_calls": False},
     {"tools": TOOLS, "parallel_tool_calls": False}),
]  # fmt: skip
# Messages of the client; those of a body.
MESSAGES = [
    ([TURN], [TURN]),
    ([{"role": "developer", "content": PARTS}, {**TURN, "name": "Eve"}],) * 2,
    ([TURN, {"role": "assistant", "tool_calls": [CALL]},
      {"role": "tool", "content": "r", "tool_call_id": "c"}],) * 2,
    ([TURN, {"role": "assistant", "tool_calls": [ToolCall("c", "f", '{"a": 1}')]}],
     [TURN, {"role": "assistant", "tool_calls": [CALL]}]),
]  # fmt: skip

# What one door alone has, and why.
ONLY_GRPC = {
    "ToolCall.index",  # of answers: which call a part belongs to
}
ONLY_HTTP = {
    "stream", "stream_options",  # over gRPC these are calls of their own, and always told
    "return_token_ids", "return_tokens_as_token_ids",  # gRPC always returns ids
    "timeout",  # the deadline of a call
    "echo",  # the caller has its prompt; prompt_logprobs are Generation's as well
    "best_of",  # no other value than n
}  # fmt: skip
ONLY_HTTP_KEYS = {"strict"}  # of functions: what is written fits their schemas anyway


@pytest.fixture
def asked(monkeypatch):
    """What the services were asked for; they do nothing of it."""
    seen = []

    async def noting(self, spec, tenant):
        seen.append(spec)
        raise InvalidArgumentError("noted")

    monkeypatch.setattr(GenerationService, "submit", noting)
    monkeypatch.setattr(TokenService, "tokenize", noting)
    return seen


@pytest.fixture
def same(asked, client, http, base):
    """Asks both doors, and fails unless they asked the services for the same."""

    async def same(prompt, options, path, body):
        await client.adapters.put("one", to_bytes(base.adapter(1)))
        for method in ("generate", "stream") if path != "/tokenize" else ("tokenize",):
            asked.clear()
            call = getattr(client, method)(prompt, **options)
            with pytest.raises(InvalidArgumentError, match="noted"):
                await (anext(call) if method == "stream" else call)
            response = await http.post(path, json={"model": "tiny", **body})
            assert "noted" in response.text, response.text
            over_grpc, over_http = map(plain, asked)
            assert over_grpc == over_http

    return same


def plain(spec):
    """A spec as values that compare, without what is the call's own: its deadline.

    HTTP has looked an adapter up by then, to tell an unknown model before all else.
    """
    values = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
    if isinstance(spec.adapter, Published):
        values["adapter"] = spec.adapter.name
    values.pop("timeout_s", None)
    values["priority"] = values.get("priority") or 0
    if isinstance(spec.prompt, Chat):
        chat = {f.name: getattr(spec.prompt, f.name) for f in dataclasses.fields(Chat)}
        values["prompt"] = chat | {
            "messages": normal(spec.prompt.messages), "tools": options_of(spec.prompt).tools
        }  # fmt: skip
    for name, value in values.items():
        if not isinstance(value, str | dict) and hasattr(value, "__iter__"):
            values[name] = list(value)
        if hasattr(value, "items"):
            values[name] = dict(value)
    return values


async def test_a_completion_is_the_same_through_every_door(same):
    for prompt, options, body in TEXTS:
        await same(prompt, options, "/v1/completions", body)
    for options, fields in OPTIONS:
        await same("a", options, "/v1/completions", {"prompt": "a", **fields})


async def test_a_chat_is_the_same_through_every_door(same):
    for options, fields in OPTIONS + OF_CHAT:
        await same([TURN], options, "/v1/chat/completions", {"messages": [TURN], **fields})
    for ours, theirs in MESSAGES:
        await same(ours, {}, "/v1/chat/completions", {"messages": theirs})


# Arguments of `client.tokenize`; fields of /tokenize.
OF_TOKENIZE = [
    ("a", {"adapter": "one"}, {"prompt": "a", "model": "one"}),
    ("a", {"add_special_tokens": False}, {"prompt": "a", "add_special_tokens": False}),
    *(([TURN], options, {"messages": [TURN], **fields}) for options, fields in OF_CHAT
      if set(fields) <= set(TokenizeBody.model_fields)),
]  # fmt: skip


async def test_tokens_are_the_same_through_every_door(same):
    for prompt, options, body in OF_TOKENIZE:
        await same(prompt, options, "/tokenize", body)
    for ours, theirs in MESSAGES:
        await same(ours, {}, "/tokenize", {"messages": theirs})


def set_in(message):
    """Yields each field that is set in a message and in those inside it."""
    for field, value in message.ListFields():
        yield f"{message.DESCRIPTOR.name}.{field.name}"
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for inner in value if hasattr(value, "__len__") else [value]:
            yield from set_in(inner)


def fields_of(descriptor):
    """Yields each field of a message and of those inside it."""
    for field in descriptor.fields:
        yield f"{descriptor.name}.{field.name}"
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            yield from fields_of(field.message_type)


def test_every_field_of_every_door_is_compared_or_told_to_be_one_doors_own():
    sent = [_calls.generation(prompt, **options) for prompt, options, _ in TEXTS]
    sent += [_calls.generation("a", **dict(options)) for options, _ in OPTIONS]
    sent += [_calls.generation([TURN], **dict(options)) for options, _ in OF_CHAT]
    sent += [_calls.generation(ours) for ours, _ in MESSAGES]
    compared = {name for message in sent for name in set_in(message)}
    assert compared | ONLY_GRPC == set(fields_of(pb.Generation.DESCRIPTOR))
    assert not compared & ONLY_GRPC
    given = {name for options, _ in OPTIONS + OF_CHAT for name in options}
    given |= {name for _, options, _ in TEXTS for name in options}
    assert given == set(GenerationOptions.__annotations__)
    in_bodies = {name for _, fields in OPTIONS + OF_CHAT for name in fields} | {"messages"}
    in_bodies |= {name for _, _, fields in TEXTS for name in fields}
    there = {*ChatBody.model_fields, *CompletionBody.model_fields}
    assert in_bodies | ONLY_HTTP == there
    assert not in_bodies & ONLY_HTTP


def test_the_page_of_calling_tells_what_one_door_alone_has():
    page = (ROOT / "docs" / "calling.md").read_text(encoding="utf-8")
    table = page.partition("## Only here")[2].partition("\n## ")[0]
    for name in ONLY_HTTP:
        assert f"`{name}`" in table, name
    tasks = runpy.run_path(str(ROOT / "docs" / "generate_api.py"))["TASKS"]
    one_sided = [http for _, http, grpc, _ in tasks if http and not grpc]
    assert one_sided
    for http in one_sided:
        assert f"`{http.split(', ')[0].split()[1]}`" in table, http


def test_every_field_of_a_tokenization_is_compared():
    bodies = {name for _, _, body in OF_TOKENIZE for name in body}
    assert bodies | {"return_token_strs"} == set(TokenizeBody.model_fields)
    sent = {
        name
        for prompt, options, _ in OF_TOKENIZE
        for name in set_in(_calls.tokenize_request(
            prompt, options.get("adapter"), options.get("add_special_tokens"), True,
            {k: v for k, v in options.items() if k not in ("adapter", "add_special_tokens")},
        )) if name.startswith("TokenizeRequest.")
    }  # fmt: skip
    assert sent == {f"TokenizeRequest.{f.name}" for f in pb.TokenizeRequest.DESCRIPTOR.fields}


def test_every_key_of_a_message_and_of_a_function_is_compared():
    assert {key for _, turns in MESSAGES for turn in turns for key in turn} == set(MESSAGE_KEYS)
    assert set(FUNCTION) | ONLY_HTTP_KEYS == set(FUNCTION_KEYS)
    assert json.loads(CALL["function"]["arguments"])
