"""What a request costs the event loop: in proportion to its bytes, whatever it is made of."""

import asyncio
import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redmux.errors import InvalidArgumentError, RedmuxError, ResourceExhaustedError
from redmux.v1 import adapter_service_pb2 as adapter_pb
from redmux.v1 import inference_service_pb2 as pb
from redmux.v1 import training_service_pb2 as training_pb
from redmux_adapters import Adapter, Edit, to_bytes
from redmux_adapters.text.encoder import Encoded
from redmux_server.engine.request import Pooling
from redmux_server.fair_thread import FairThread
from redmux_server.grpc_api.adapters import AdapterServicer
from redmux_server.grpc_api.servicers import InferenceServicer
from redmux_server.grpc_api.training import TrainingServicer
from redmux_server.keys import ApiKeys
from redmux_server.metrics import Metrics
from redmux_server.registry.registry import AdapterRegistry
from redmux_server.services.generation import GenerationService
from redmux_server.services.grammar import Grammars
from redmux_server.services.pinning import Pins
from redmux_server.services.reading import ReadableModel, ReadingService
from redmux_server.services.scoring import ScoringService
from redmux_server.services.spec import Chat, GenerationSpec, ScoreSpec
from redmux_server.services.tokens import TokenService
from redmux_server.services.validation import Validator
from redmux_server.training.check import MAX_TASKS
from redmux_server.training.service import TrainingService

CONTEXT = 256
# Of the interpreter, on the event loop. The dearest are continuations of four bytes, each of which
# has a turn of its own in the tokenizer's thread.
STEPS_PER_BYTE = 400
STEPS_PER_CALL = 20_000
STEPS_OF_A_REFUSAL = 2_000
NAMES = [f"{'abcd' * 15}-{i:03d}/{'dcba' * 15}" for i in range(200)]


class FullEngine:
    """Takes nothing, so that a request costs what comes before it is queued."""

    most_for_one = 64

    def submit(self, *requests):
        raise ResourceExhaustedError("full")

    submit_in_turn = submit


class Codec:
    """A token for each letter; runs in a thread of its own."""

    eos_token_ids = frozenset()

    def encode(self, text, most):
        return Encoded([1] * len(text))

    encode_input = encode

    def encode_chat(self, messages, prompt_format, options, *, most):
        return Encoded([1] * len(messages))

    def encode_pair(self, first, second, most):
        return Encoded([1]), [0]

    def tokenizer_json(self):
        return None

    def encode_continuation(self, prompt, prompt_ids, text, most):
        return [1] * len(text)

    def decoder(self, *, skip_special_tokens):
        return str


@pytest.fixture(scope="module")
def servicers():
    """Every servicer by the kind of its messages."""
    registry = AdapterRegistry("tiny-1x4-0", {"a": 4})
    data = to_bytes(Adapter("tiny-1x4-0", {"a": Edit(torch.ones(4), torch.zeros(4))}))
    for name in NAMES:
        asyncio.run(registry.put(name, data, "", replace=False))
    with contextlib.suppress(RedmuxError):  # the first time, SQL has to be written
        asyncio.run(registry.delete("none"))
    validator, metrics, engine = Validator(260, CONTEXT), Metrics(), FullEngine()
    with contextlib.closing(FairThread("tokenizer")) as tokenizing:
        parts = engine, Pins(registry), Codec(), validator, metrics, tokenizing
        generation = GenerationService(*parts, Grammars(Codec(), 260, tokenizing))
        reading = ReadingService(ReadableModel("encoder", "X", 4, Pooling.MEAN), *parts)
        scoring = ScoringService(engine, generation, validator, metrics)
        tokens = TokenService(Codec(), validator, generation)
        keys = ApiKeys(())  # which need no context
        training = TrainingService(
            object(), registry, metrics, max_queued=8, share=0.5,
            is_busy=lambda: False, on_publish=lambda: None,
        )  # fmt: skip
        training._checker = SimpleNamespace(check=refuse)
        yield SimpleNamespace(
            inference=InferenceServicer(generation, scoring, reading, tokens, keys),
            adapters=AdapterServicer(registry, lambda: None, keys),
            training=TrainingServicer(training, keys),
        )


def refuse(tasks):
    raise InvalidArgumentError("checked in another thread")


def steps_of(method, request):
    """Returns how many steps of the interpreter a call takes on the event loop."""
    num_steps = 0

    def trace(frame, event, argument):
        nonlocal num_steps
        frame.f_trace_opcodes = True
        num_steps += event == "opcode"
        return trace

    async def call():
        sys.settrace(trace)
        try:
            result = method(request, SimpleNamespace(time_remaining=lambda: None))
            await (anext(result) if hasattr(result, "__anext__") else result)
        except RedmuxError:
            pass
        finally:
            sys.settrace(None)

    previous = sys.gettrace()
    try:
        asyncio.run(call())
    finally:
        sys.settrace(previous)
    return num_steps


def check(method, request):
    limit = STEPS_PER_CALL + STEPS_PER_BYTE * request.ByteSize()
    assert steps_of(method, request) <= limit


counts = st.sampled_from([0, 1, 2, 17, 129, 300, 1025, 5000])
texts = st.sampled_from(["", "a", "abcd" * 8])
token_ids = st.builds(lambda n: pb.TokenIds(ids=[7] * n), counts)
chats = st.builds(
    lambda n, m, text: pb.Chat(
        messages=[
            pb.ChatMessage(
                role="user"[: len(text)], content=text,
                tool_calls=[pb.ToolCall(name="f", arguments=text)] * (m % 7),
            )
        ]
        * n,
        tools=[pb.Tool(name=f"f{i}", parameters_json='{"a":{"b":[1]}}') for i in range(m)],
        tool_choice="none",
    ),
    counts, counts, texts,
)  # fmt: skip
prompts = st.one_of(
    st.builds(lambda t, n: {"text": t * n}, texts, counts),
    st.builds(lambda ids: {"token_ids": ids}, token_ids),
    st.builds(lambda chat: {"chat": chat}, chats),
)
stopping = st.builds(
    lambda text, n, m: pb.Stopping(stop=[text] * n, stop_token_ids=[5] * m), texts, counts, counts
)
generations = st.builds(
    lambda prompt, stop: pb.Generation(**prompt, stopping=stop), prompts, stopping
)
parts = st.one_of(
    st.builds(lambda t: {"text": t}, texts), st.builds(lambda ids: {"token_ids": ids}, token_ids)
)


@given(generations)
@settings(max_examples=40, deadline=None)
def test_a_generation_costs_in_proportion_to_its_bytes(servicers, generation):
    check(servicers.inference.Complete, pb.CompleteRequest(generation=generation))
    check(servicers.inference.Generate, pb.GenerateRequest(generation=generation))


@given(prompts, parts, counts)
@settings(max_examples=40, deadline=None)
def test_a_score_costs_in_proportion_to_its_bytes(servicers, prompt, part, num):
    num = num if part.get("text") is not None else min(num, 300)
    request = pb.ScoreRequest(**prompt, continuations=[pb.Continuation(**part)] * num)
    check(servicers.inference.Score, request)


@given(parts, counts)
@settings(max_examples=40, deadline=None)
def test_readings_cost_in_proportion_to_their_bytes(servicers, part, num):
    num = num if part.get("text") is not None else min(num, 300)
    inputs = [pb.Input(**part)] * num
    check(servicers.inference.Embed, pb.EmbedRequest(inputs=inputs))
    check(servicers.inference.Classify, pb.ClassifyRequest(adapter=NAMES[0], inputs=inputs))


@given(st.text("abcd/-", max_size=200))
@settings(max_examples=40, deadline=None)
def test_the_look_up_of_any_name_costs_in_proportion_to_its_bytes(servicers, name):
    check(servicers.adapters.GetAdapter, adapter_pb.GetAdapterRequest(name=name))
    check(servicers.adapters.DeleteAdapter, adapter_pb.DeleteAdapterRequest(name=name))


@pytest.mark.parametrize("name", [NAMES[0][:-1], NAMES[99] + "x", "abcd" * 32, "a" * 60_000])
def test_names_made_to_be_like_all_others_cost_no_more(servicers, name):
    check(servicers.adapters.GetAdapter, adapter_pb.GetAdapterRequest(name=name))


@pytest.mark.parametrize("num", [1, MAX_TASKS, 5000])
def test_a_job_costs_in_proportion_to_its_bytes(servicers, num):
    tasks = [training_pb.TrainingTask(adapter=f"x{i}") for i in range(num)]
    check(servicers.training.CreateJob, training_pb.CreateJobRequest(tasks=tasks))
    names = [task.adapter for task in tasks]
    check(servicers.training.CancelJob, training_pb.CancelJobRequest(id="x", adapters=names))


MANY = 5000
TOO_MANY = {
    "messages": ("Complete", {"chat": pb.Chat(messages=[pb.ChatMessage()] * MANY)}),
    "tools": (
        "Complete",
        {"chat": pb.Chat(messages=[pb.ChatMessage()], tools=[pb.Tool()] * MANY)},
    ),
    "token ids": ("Complete", {"token_ids": pb.TokenIds(ids=[7] * MANY)}),
    "stop texts": ("Complete", {"text": "x", "stopping": pb.Stopping(stop=[""] * MANY)}),
    "continuations": ("Score", {"text": "x", "continuations": [pb.Continuation()] * MANY}),
    "inputs": ("Embed", {"inputs": [pb.Input()] * MANY}),
    "tokens": ("Detokenize", {"token_ids": [7] * MANY}),
    "tasks": ("CreateJob", {"tasks": [{"adapter": f"x{i}"} for i in range(MANY)]}),
}
REQUESTS = {
    "Complete": lambda fields: pb.CompleteRequest(generation=pb.Generation(**fields)),
    "Score": lambda fields: pb.ScoreRequest(**fields),
    "Detokenize": lambda fields: pb.DetokenizeRequest(**fields),
    "Embed": lambda fields: pb.EmbedRequest(**fields),
    "CreateJob": lambda fields: training_pb.CreateJobRequest(**fields),
}


@pytest.mark.parametrize("what", TOO_MANY)
def test_what_are_too_many_cost_no_more_than_a_few_too_many(servicers, what):
    name, fields = TOO_MANY[what]
    servicer = servicers.training if name == "CreateJob" else servicers.inference
    steps = steps_of(getattr(servicer, name), REQUESTS[name](fields))
    assert steps <= STEPS_OF_A_REFUSAL


class Uncountable(list):
    """A list that tells its length, and whose items nobody may ask for."""

    def __iter__(self):
        raise AssertionError("the list was walked")

    __getitem__ = __iter__


def long(item, num):
    return Uncountable([item] * num)


LONG = {
    "token_ids has 257 tokens": lambda v: v.prompt(long(1, CONTEXT + 1)),
    "chat has 4097 messages": lambda v: v.prompt(Chat(long({}, 4097))),
    "chat has 129 tools": lambda v: v.prompt(Chat([{}], tools=long({}, 129))),
    "stop has 17 strings": lambda v: v.stops(GenerationSpec("x", stop=long("x", 17))),
    "65 tokens; limit 64": lambda v: v.stops(GenerationSpec("x", stop_token_ids=long(1, 65))),
    "129 continuations": lambda v: v.continuations(ScoreSpec("x", long("x", 129))),
    r"continuations\[0\].token_ids has 257": lambda v: v.continuations(
        ScoreSpec("x", [long(1, CONTEXT + 1)])
    ),
    "9 inputs; limit 8": lambda v: v.inputs(long("x", 9), 8),
    r"inputs\[0\].token_ids has 257": lambda v: v.inputs([long(1, CONTEXT + 1)], 8),
}


@pytest.mark.parametrize("message", LONG)
def test_a_list_that_is_too_long_is_refused_by_its_length_alone(message):
    with pytest.raises(InvalidArgumentError, match=message):
        LONG[message](Validator(260, CONTEXT))


def test_scores_that_would_not_fit_a_message_are_refused_before_they_are_computed():
    validator = Validator(260, 100_000)
    validator.scored(1, [range(75_000)] * 4)
    with pytest.raises(InvalidArgumentError, match="300004 tokens; limit 300000"):
        validator.scored(1, [range(75_001)] * 4)
