import grpc
import pytest

import redmux

DIGEST = "sha256:" + "ab" * 32


def test_generate_returns_the_whole_completion(client):
    assert client.generate("Say hello", adapter="acme/tales") == redmux.Completion(
        text="Hello world",
        token_ids=(7, 8, 9),
        logprobs=None,
        finish_reason="stop",
        stop="\n",
        usage=redmux.Usage(4, 3, cached_prompt_tokens=2, added_special_tokens=1),
        adapter="acme/tales",
        digest=DIGEST,
    )


def test_stream_yields_a_chunk_per_message(client):
    assert list(client.stream("Say hello", adapter="acme/tales")) == [
        redmux.Chunk("Hello", (7,), None, "acme/tales", DIGEST, None, None, None),
        redmux.Chunk(
            " world", (8, 9), None, "acme/tales", DIGEST, "stop", "\n", redmux.Usage(4, 3, 2, 1)
        ),
    ]


def test_usage_tells_what_was_cached_and_equals_the_usage_of_a_cold_request(client):
    usage = client.generate("Say hello").usage
    assert usage.cached_prompt_tokens == 2
    assert list(client.stream("Say hello"))[-1].usage.cached_prompt_tokens == 2
    assert usage == redmux.Usage(4, 3, cached_prompt_tokens=0, added_special_tokens=1)


def test_the_base_model_has_neither_name_nor_digest(client, server):
    completion = client.generate("Say hello")
    assert (completion.adapter, completion.digest) == (None, None)
    assert [(chunk.adapter, chunk.digest) for chunk in client.stream("Hi")] == [(None, None)] * 2
    assert all(call.request.generation.adapter == "" for call in server.calls)


def test_logprobs_come_with_every_token_if_asked_for(client):
    assert client.generate("Hi", logprobs=True).logprobs == (-0.5, -0.25, -2.0)
    chunks = list(client.stream("Hi", logprobs=True))
    assert [chunk.logprobs for chunk in chunks] == [(-0.5,), (-0.25, -2.0)]


def test_a_completion_cut_by_max_tokens_has_the_reason_length_and_no_stop(client, server):
    def script(generation, call):
        for message in server.two_messages(generation, call):
            if message.HasField("finish"):
                message.finish.reason = 2
                message.finish.stop = ""
            yield message

    server.script = script
    completion = client.generate("Hi")
    assert (completion.finish_reason, completion.stop) == ("length", None)


@pytest.fixture(params=["generate", "stream"])
def send(request, client, server):
    """Sends a generation by either method and returns what the server got."""

    def send(*arguments, **options):
        result = getattr(client, request.param)(*arguments, **options)
        if request.param == "stream":
            list(result)
        return server.calls[-1].request.generation

    return send


def test_a_text_is_sent_as_it_stands(send):
    assert send(" Once\u00e9 ").text == " Once\u00e9 "


@pytest.mark.parametrize("ids", [[1, 2, 49_151], (1,), range(3)])
def test_a_sequence_of_ints_is_sent_as_token_ids(send, ids):
    generation = send(ids)
    assert generation.WhichOneof("prompt") == "token_ids"
    assert list(generation.token_ids.ids) == list(ids)


def test_mappings_are_sent_as_chat(send):
    messages = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Hi"}]
    chat = send(messages).chat
    assert [{"role": m.role, "content": m.content} for m in chat.messages] == messages


def test_all_options_reach_the_server(send):
    generation = send(
        "Hi",
        adapter="acme/tales",
        max_tokens=12,
        temperature=0.5,
        top_p=0.25,
        top_k=40,
        seed=2**64 - 1,
        stop=["\n", "END"],
        stop_token_ids=[3, 4],
        ignore_eos=True,
        logprobs=True,
    )
    assert generation.adapter == "acme/tales"
    assert generation.logprobs
    sampling, stopping = generation.sampling, generation.stopping
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 40)
    assert sampling.seed == 2**64 - 1
    assert (stopping.max_tokens, stopping.ignore_eos) == (12, True)
    assert (list(stopping.stop), list(stopping.stop_token_ids)) == (["\n", "END"], [3, 4])


def test_options_left_out_are_unset_on_the_wire(send):
    generation = send("Hi")
    for name in ("temperature", "top_p", "top_k", "seed"):
        assert not generation.sampling.HasField(name)
    assert not generation.stopping.HasField("max_tokens")


def test_zero_is_sent_and_not_taken_for_unset(send):
    generation = send("Hi", temperature=0, top_k=0, seed=0)
    assert all(generation.sampling.HasField(name) for name in ("temperature", "top_k", "seed"))


@pytest.mark.parametrize("method", ["generate", "stream"])
@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (None, {}),
        (b"bytes", {}),
        (7, {}),
        ({"role": "user", "content": "Hi"}, {}),
        ([1, "two"], {}),
        ([True], {}),
        ([1.5], {}),
        ([2**31], {}),
        (["Hi"], {}),
        ([{"role": "user"}], {}),
        ([{"role": "user", "content": "Hi", "audio": "x"}], {}),
        ([{"role": "user", "content": 3}], {}),
        ([{"role": "user", "content": "Hi"}, 3], {}),
        ("\ud800", {}),
        ("Hi", {"adapter": ""}),
        ("Hi", {"adapter": 3}),
        ("Hi", {"stop": "\n"}),
        ("Hi", {"stop": [3]}),
        ("Hi", {"max_tokens": "many"}),
        ("Hi", {"max_tokens": 2**31}),
        ("Hi", {"seed": -1}),
        ("Hi", {"temperature": "hot"}),
        ("Hi", {"timeout_s": 0}),
        ("Hi", {"timeout_s": float("inf")}),
        ("Hi", {"timeout_s": float("nan")}),
        ("Hi", {"timeout_s": "1"}),
    ],
    ids=repr,
)
def test_arguments_of_a_wrong_kind_are_refused_before_anything_is_sent(
    client, server, method, prompt, options
):
    # For `stream` at the call itself, not when the first chunk is asked for.
    with pytest.raises(redmux.InvalidArgumentError):
        getattr(client, method)(prompt, **options)
    assert server.calls == []


def test_ranges_are_left_to_the_server(send):
    generation = send("", max_tokens=-1, temperature=1e6)
    assert (generation.text, generation.stopping.max_tokens) == ("", -1)


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_unknown_options_are_refused(client, method):
    with pytest.raises(TypeError, match="max_new_tokens"):
        getattr(client, method)("Hi", max_new_tokens=3)


def test_closing_a_stream_early_cancels_it_on_the_server(client, server):
    server.script = server.first_then_silence
    chunks = client.stream("Hi")
    assert next(chunks).text == "Hello"
    assert not server.calls[0].has_ended.is_set()
    chunks.close()
    assert server.calls[0].has_ended.wait(10)


def test_an_error_in_a_stream_comes_after_the_chunks_before_it(client, server):
    def script(generation, call):
        yield from server.first_message(generation, call)
        raise AssertionError("the engine broke")

    server.script = script
    chunks = client.stream("Hi")
    assert next(chunks).text == "Hello"
    with pytest.raises(redmux.RedmuxError, match="the engine broke"):
        next(chunks)


def test_a_stream_without_its_last_message_is_an_error(client, server):
    server.script = server.first_message
    chunks = client.stream("Hi")
    assert next(chunks).finish_reason is None
    with pytest.raises(redmux.RedmuxError, match="ended before the completion"):
        next(chunks)


def test_a_finish_reason_unknown_to_this_client_is_an_error(client, server):
    def script(generation, call):
        for message in server.two_messages(generation, call):
            message.finish.reason = 9
            yield message

    server.script = script
    with pytest.raises(redmux.RedmuxError, match="unknown to this client"):
        client.generate("Hi")
    with pytest.raises(redmux.RedmuxError, match="unknown to this client"):
        next(client.stream("Hi"))


def test_a_deadline_ends_a_completion_and_frees_the_server(client, server):
    server.script = server.first_then_silence
    with pytest.raises(redmux.DeadlineExceededError):
        client.generate("Hi", timeout_s=0.2)
    assert server.calls[0].has_ended.wait(10)


def test_a_deadline_in_a_stream_keeps_the_chunks_before_it(client, server):
    server.script = server.first_then_silence
    chunks = client.stream("Hi", timeout_s=1)
    assert next(chunks).text == "Hello"
    with pytest.raises(redmux.DeadlineExceededError):
        next(chunks)


def test_every_call_has_a_deadline(connect, target, server):
    client = connect(target, timeout_s=40)
    client.generate("Hi")
    list(client.stream("Hi"))
    client.generate("Hi", timeout_s=5)
    list(client.stream("Hi", timeout_s=5))
    client.info()
    given = [call.time_remaining_s for call in server.calls]
    for seconds, expected in zip(given, [40, 600, 5, 5, 40], strict=True):
        assert abs(seconds - expected) < 4  # gRPC sends whole seconds here


def test_the_default_deadline_is_a_minute(client, server):
    client.info()
    assert 56 < server.calls[0].time_remaining_s < 64


def test_an_unused_stream_sends_nothing(client, server):
    client.stream("Hi").close()
    client.info()
    assert [call.method for call in server.calls] == ["GetServerInfo"]


def test_a_server_that_cancels_is_an_error_and_not_a_cancelled_task(client, server):
    server.fail = lambda call, context: context.abort(grpc.StatusCode.CANCELLED, "given up")
    with pytest.raises(redmux.RequestCancelledError, match="given up"):
        client.generate("Hi")
    with pytest.raises(redmux.RequestCancelledError, match="given up"):
        next(client.stream("Hi"))
