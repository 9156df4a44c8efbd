"""Messages of generation and what the services make of them."""

import dataclasses

import pytest

from redmux.v1 import inference_service_pb2 as pb
from redmux_server.engine.request import FinishReason
from redmux_server.grpc_api.generating import ToolParsers, Whole, fill_chunk, spec_of
from redmux_server.services.choice import Delta, Finish
from redmux_server.services.generation import Generation, PromptScores
from redmux_server.services.spec import GenerationSpec

SAMPLING = {
    "temperature": 0.5, "top_p": 0.25, "top_k": 3, "seed": 7, "min_p": 0.125, "typical_p": 0.75,
    "presence_penalty": 1.5, "frequency_penalty": -1.5, "repetition_penalty": 2.0,
    "no_repeat_ngram": 4, "logit_bias": {5: 1.5}, "allowed_token_ids": [1, 2], "bad_words": ["x"],
    "bad_token_ids": [9], "n": 6,
}  # fmt: skip
STOPPING = {
    "max_tokens": 11, "min_tokens": 2, "stop": ["."], "stop_token_ids": [8], "stop_regex": "a+",
    "ignore_eos": True, "include_stop_str": True,
}  # fmt: skip
REST = {
    "adapter": "a", "logprobs": True, "top_logprobs": 3, "prompt_logprobs": 0,
    "skip_special_tokens": False, "priority": -4, "apply": "prompt",
}  # fmt: skip
ELSEWHERE = {"prompt", "timeout_s", "grammar"}  # forms, the call's deadline, the grammar's own


def plain(value):
    return dict(value) if hasattr(value, "items") else list(value) if is_list(value) else value


def is_list(value):
    return hasattr(value, "__len__") and not isinstance(value, str)


def test_every_option_of_a_message_reaches_the_service():
    message = pb.Generation(
        text="x", sampling=pb.Sampling(**SAMPLING), stopping=pb.Stopping(**STOPPING), **REST
    )
    spec = spec_of(message, None)
    options = SAMPLING | STOPPING | REST
    assert {name: plain(getattr(spec, name)) for name in options} == options
    assert {field.name for field in dataclasses.fields(GenerationSpec)} - ELSEWHERE == set(options)


def test_what_a_message_leaves_out_is_unset():
    spec = spec_of(pb.Generation(text="x"), None)
    for field in dataclasses.fields(GenerationSpec):
        if field.name not in ("prompt", "priority"):
            default = GenerationSpec("x")
            assert plain(getattr(spec, field.name)) == plain(getattr(default, field.name))
    assert spec.priority == 0


@pytest.mark.parametrize(("remaining_s", "expected"), [(None, None), (9.5, 9.5), (-1.0, 1e-3)])
def test_what_is_left_of_the_call_is_the_time_of_the_request(remaining_s, expected):
    assert spec_of(pb.Generation(text="x"), remaining_s).timeout_s == expected


def finish(num_tokens, **options):
    return Finish(FinishReason.STOP, "", 4, 2, 1, num_tokens, total_s=2.5, **options)


def test_choices_are_joined_by_their_index():
    scores = PromptScores([None, -1.5], [[], [(3, -0.5)]])
    whole = Whole()
    for delta in (
        Delta(1, "b", [2], [-2.0], [[(2, -2.0)]]),
        Delta(0, "a", [1], [-1.0], [[(1, -1.0)]], finish(1, stop_token_id=1, first_token_s=0.5)),
        Delta(1, "c", [3], [-3.0], [[(4, -2.5)]], finish(2)),
    ):
        whole.add(delta)
    message = whole.response(Generation([7, 8], [], None, None, scores), None)
    (other,) = message.other_choices
    assert (message.text, other.text, list(other.token_ids)) == ("a", "bc", [2, 3])
    assert (message.finish.stop_token_id, message.finish.first_token_s) == (1, 0.5)
    assert not other.finish.HasField("stop_token_id")
    assert [list(top.token_ids) for top in other.top_logprobs] == [[2], [4]]
    assert (list(message.prompt.token_ids), list(message.prompt.logprobs)) == ([8], [-1.5])
    assert list(message.prompt.top_logprobs[0].token_ids) == [3]


def test_a_message_that_is_used_again_holds_nothing_of_the_delta_before():
    message = pb.GenerateResponse()
    first = Delta(2, "a", [1], [-1.0], [[(1, -1.0)]], finish(1))
    parsers = ToolParsers(Generation([7, 8], [], None, None))
    fill_chunk(message, first, parsers, pb.PromptScores(token_ids=[8]))
    message.tool_calls.add(id="of before")
    fill_chunk(message, Delta(0, "b"), parsers, None)
    assert message == pb.GenerateResponse(text="b")
