import asyncio
import contextlib
import itertools
import sys
import threading

import grpc
import pytest

import redmux


@pytest.fixture(autouse=True)
def echo(server):
    """Makes the server answer with the prompt, and is the script that does."""

    def script(generation, call):
        for message in server.two_messages(generation, call):
            message.text = generation.text if message.HasField("finish") else ""
            yield message

    server.script = script
    return script


def refuse(text):
    def fail(call, context):
        if call.request.generation.text == text:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no {text}")

    return fail


def test_completions_come_in_the_order_of_the_prompts(client, server, echo):
    other_is_done = threading.Event()

    def script(generation, call):
        if generation.text == "slow":
            assert other_is_done.wait(10)
        yield from echo(generation, call)
        if generation.text == "quick":
            other_is_done.set()

    server.script = script
    completions = client.map(["slow", "quick", "last"], adapter="a", max_tokens=3)
    assert [(done.text, done.adapter) for done in completions] == [
        ("slow", "a"), ("quick", "a"), ("last", "a"),
    ]  # fmt: skip
    assert {call.request.generation.stopping.max_tokens for call in server.calls} == {3}


def test_no_more_requests_than_wanted_are_under_way(client, server, echo):
    all_three = threading.Barrier(3)
    num_ended = 0
    lock = threading.Lock()

    def script(generation, call):
        nonlocal num_ended
        all_three.wait(10)
        with lock:
            num_ended += 1
        yield from echo(generation, call)

    def prompts():
        for num_begun in range(12):
            assert num_begun - num_ended < 3
            yield str(num_begun)

    server.script = script
    assert len(list(client.map(prompts(), concurrency=3))) == 12


def test_an_endless_iterator_is_asked_for_no_more_than_is_held(client, server, echo):
    held = threading.Event()
    found = []

    def script(generation, call):
        if generation.text == "0":  # all others wait for it
            assert held.wait(10)
        yield from echo(generation, call)

    def prompts():
        for number in itertools.count():
            assert number - len(found) < 4 * 2
            if number == 7:
                held.set()
            yield str(number)

    server.script = script
    completions = client.map(prompts(), concurrency=2)
    for done in itertools.islice(completions, 30):
        found.append(done.text)
    assert found == [*map(str, range(30))]
    completions.close()


def test_the_first_error_in_order_ends_it(client, server):
    server.fail = refuse("1")
    completions = client.map(["0", "1", "2"])
    assert next(completions).text == "0"
    with pytest.raises(redmux.InvalidArgumentError, match="no 1"):
        next(completions)
    with pytest.raises(StopIteration):
        next(completions)


def test_errors_stand_in_the_place_of_their_completions_if_wanted(client, server):
    server.fail = refuse("1")
    found = list(client.map(["0", "1", [1, "x"], "2"], return_exceptions=True))
    assert [found[0].text, found[3].text] == ["0", "2"]
    assert [type(item) for item in found[1:3]] == [redmux.InvalidArgumentError] * 2
    assert "no 1" in found[1].message
    assert "prompt mixes token ids" in found[2].message


def test_an_iterator_that_fails_fails_the_map(client):
    def prompts():
        yield "0"
        raise LookupError("the file is gone")

    with pytest.raises(LookupError, match="the file is gone"):
        list(client.map(prompts()))


def test_closing_it_cancels_what_is_under_way(client, server, echo):
    all_three = threading.Barrier(3)

    def script(generation, call):
        all_three.wait(10)
        if generation.text != "0":
            assert call.has_ended.wait(60)
        yield from echo(generation, call)

    server.script = script
    completions = client.map(map(str, range(3)), concurrency=3)
    assert next(completions).text == "0"
    completions.close()
    waiting = [call for call in server.calls if call.request.generation.text != "0"]
    assert [call.has_ended.wait(10) for call in waiting] == [True, True]


def test_each_request_has_the_limit(client, server):
    list(client.map(["0", "1"], timeout_s=7))
    assert all(abs(call.time_remaining_s - 7) < 4 for call in server.calls)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("text", {}, r"prompts is one str; give an iterable of prompts, such as \[text\]"),
        (7, {}, "prompts is int; give an iterable"),
        (["a"], {"concurrency": 0}, "concurrency is 0, must be at least 1"),
        (["a"], {"timeout_s": -1}, "timeout_s is a positive number"),
    ],
)
def test_what_cannot_be_mapped_is_refused_at_once(target, prompts, options, message):
    with redmux.Client(target) as client, pytest.raises(redmux.InvalidArgumentError, match=message):
        client.map(prompts, **options)
    with pytest.raises(redmux.InvalidArgumentError, match=message):
        redmux.AsyncClient(target).map(prompts, **options)


def test_a_closed_client_maps_nothing(connect, target):
    client = connect(target)
    client.close()
    with pytest.raises(redmux.FailedPreconditionError, match="the client is closed"):
        list(client.map(["a"]))


async def test_prompts_may_come_asynchronously_and_slowly(target):
    first_is_answered = asyncio.Event()

    async def prompts():
        yield "0"
        await first_is_answered.wait()  # an answer does not wait for the next prompt
        yield "1"

    async with redmux.AsyncClient(target) as client:
        found = []
        async with contextlib.aclosing(client.map(prompts())) as completions:
            async for done in completions:
                found.append(done.text)
                first_is_answered.set()
    assert found == ["0", "1"]


def test_progress_is_counted_by_tqdm(client, capsys):
    assert len(list(client.map(["0", "1"], progress=True))) == 2
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompts", "told"), [(["0", "1"], "2 of 2 done, "), (iter(["0", "1"]), "2 done, ")]
)
def test_progress_is_a_line_without_tqdm(target, monkeypatch, capsys, prompts, told):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with redmux.Client(target) as client:
        assert len(list(client.map(prompts, progress=True))) == 2
    err = capsys.readouterr().err
    assert err.startswith(told)
    assert err.endswith(" per second\n")
    assert err.count("\n") == 1


def test_nothing_is_told_without_progress(client, capsys):
    assert len(list(client.map(["0"]))) == 1
    assert capsys.readouterr().err == ""
