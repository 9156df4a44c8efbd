"""What GetServerInfo tells of the load, and what `redmux top` and `redmux chat` make of it."""

import asyncio
import io
import itertools
import json
import sys

import pytest

from redmux import InvalidArgumentError
from redmux.cli import main
from redmux_adapters import PromptFormat, Turn


async def until(condition):
    while not condition():
        await asyncio.sleep(0)


async def test_info_tells_what_was_computed_and_how_long_it_took(server, client, base, put):
    await put("x", base.adapter(1))
    before = (await client.info()).load
    assert (before.num_ended, before.num_completion_tokens, before.first_token.num) == (0, 0, 0)
    answer = await client.generate([1] * 20, adapter="x", max_tokens=9, ignore_eos=True)
    with pytest.raises(InvalidArgumentError, match="max_tokens is 0"):
        await client.generate("abc", max_tokens=0)
    await until(lambda: not server.engine.num_open)
    load = (await client.info()).load
    assert load.num_prompt_tokens == answer.usage.prompt_tokens == 20
    assert load.num_completion_tokens == 8  # the first one comes of the prompt
    assert (load.num_ended, load.num_refused) == (1, 1)
    assert (load.first_token.num, load.between_tokens.num, load.whole_request.num) == (1, 8, 1)
    assert 0 < load.first_token.sum_s < load.whole_request.sum_s
    assert (load.num_running_adapters, load.kv_cache_used) == (0, 0)
    limits = load.between_tokens.limits_s
    assert all(low < high for low, high in itertools.pairwise(limits))
    assert len(load.between_tokens.counts) == len(limits) + 1


async def test_info_tells_tokens_that_were_found_in_the_cache(server, client):
    for _ in range(2):
        await client.generate([1] * 60, max_tokens=1)
    answer = await client.generate([1] * 60, max_tokens=1)
    load = (await client.info()).load
    assert load.num_cached_tokens == 2 * answer.usage.cached_prompt_tokens > 0
    assert load.num_prompt_tokens == 3 * 60 - load.num_cached_tokens


async def test_info_tells_the_distinct_adapters_and_the_cache_of_what_runs(
    server, client, base, put
):
    for name, seed in (("x", 1), ("same", 1), ("y", 2)):
        await put(name, base.adapter(seed))
    streams = [
        client.stream("abc", adapter=name, max_tokens=200, ignore_eos=True)
        for name in ("x", "same", "y", None)
    ]
    for stream in streams:
        await anext(stream)
    found = await client.info()
    assert (found.num_running, found.load.num_running_adapters) == (4, 2)
    assert 0 < found.load.kv_cache_used <= 1
    for stream in streams:
        await stream.aclose()
    await until(lambda: not server.engine.num_open)
    assert (await client.info()).load.num_running_adapters == 0


def command(server, *arguments):
    """Runs a command in a thread of its own."""
    return asyncio.to_thread(main, [*arguments, "--target", f"127.0.0.1:{server.port}"])


async def test_top_tells_the_rates_of_a_server(server, client, capsys):
    stream = client.stream("abc", max_tokens=250, ignore_eos=True)
    await anext(stream)
    assert await command(server, "top", "--once", "--interval", "0.1", "--json") == 0
    await stream.aclose()
    found = json.loads(capsys.readouterr().out)
    assert found["completion_tokens_per_s"] > 0
    assert found["between_tokens"]["p50_s"] > 0


async def test_a_chat_that_no_longer_fits_is_told_and_can_begin_anew(
    server, client, base, put, capsys, monkeypatch
):
    await put("x", base.adapter(1, prompt_format=PromptFormat(Turn("<", ">"), Turn("[", "]"))))
    lines = ["a" * 60] * 3 + ["/reset", "a"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert await command(server, "chat", "--adapter", "x", "--max-tokens", "60") == 5
    captured = capsys.readouterr()
    assert "together they must be at most 256" in captured.err
    assert "if it has become too long, /reset begins anew" in captured.err
    assert captured.err.index("begins anew") < captured.err.index("the conversation is empty")
