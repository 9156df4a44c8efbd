"""How a completion ends, and what is streamed until then."""

import asyncio
import threading
import urllib.error
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import redmux
from redmux import AsyncClient
from redmux_server.metrics_port import State


async def whole(client, prompt="Hello there", **options):
    return await client.generate(prompt, **{"max_tokens": 40, "ignore_eos": True} | options)


async def test_max_tokens_ends_a_completion(client):
    got = await whole(client, max_tokens=7)
    assert (len(got.token_ids), got.finish_reason) == (7, "length")
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (11, 7)
    assert got.logprobs is None


async def test_a_stream_adds_up_to_the_completion(client, base, put):
    await put("x", base.adapter(3))
    expected = await whole(client, adapter="x", logprobs=True)
    options = {"adapter": "x", "max_tokens": 40, "ignore_eos": True, "logprobs": True}
    chunks = [c async for c in client.stream("Hello there", **options)]
    assert "".join(c.text for c in chunks) == expected.text
    assert tuple(t for c in chunks for t in c.token_ids) == expected.token_ids
    assert tuple(p for c in chunks for p in c.logprobs) == expected.logprobs
    assert {c.digest for c in chunks} == {base.adapter(3).digest}
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == "length"


async def test_a_stop_text_is_cut_off_and_named(client, base, put):
    await put("x", base.adapter(3))
    full = await whole(client, adapter="x")
    stop = full.text[9:12]
    assert len(stop) == 3
    got = await whole(client, adapter="x", stop=["never seen", stop])
    assert (got.finish_reason, got.stop) == ("stop", stop)
    assert got.text == full.text[: full.text.index(stop)]
    assert full.token_ids[: len(got.token_ids)] == got.token_ids


async def test_a_stop_token_ends_a_completion_without_its_text(client, base, put):
    await put("x", base.adapter(3))
    full = await whole(client, adapter="x")
    stop = full.token_ids[8]
    first = full.token_ids.index(stop)
    got = await whole(client, adapter="x", stop_token_ids=[stop])
    assert (got.finish_reason, got.stop) == ("stop", None)
    assert got.token_ids == full.token_ids[: first + 1]
    assert got.text == base.tokenizer.decode(full.token_ids[:first])


async def test_the_end_of_text_token_ends_a_completion_unless_ignored(client, base):
    """Every token but one is as likely as can be, so that a draw meets the end soon."""
    options = {"temperature": 100.0, "seed": 4, "max_tokens": 240}
    got = await whole(client, "a", **options | {"ignore_eos": False})
    ignoring = await whole(client, "a", **options)
    eos = base.tokenizer.eos_token_id
    assert got.token_ids[-1] == eos
    assert got.finish_reason == "stop"
    assert len(ignoring.token_ids) == 240
    assert ignoring.token_ids[: len(got.token_ids)] == got.token_ids


async def test_without_max_tokens_the_context_is_the_limit(client):
    got = await client.generate("x" * 200, ignore_eos=True)
    assert got.usage.completion_tokens == 56


async def test_health_tells_serving_for_every_service(server):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "redmux.v1.InferenceService", "redmux.v1.AdapterService"):
            reply = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_lists_the_services(server):
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        replies = [r async for r in stub.ServerReflectionInfo(iter([request]))]
    names = {s.name for s in replies[0].list_services_response.service}
    assert {"redmux.v1.InferenceService", "grpc.health.v1.Health"} <= names


async def test_an_api_key_is_asked_of_everything_but_health(start_server):
    server = await start_server(api_keys=("one", "two"))
    target = f"127.0.0.1:{server.port}"
    for key in (None, "three"):
        async with AsyncClient(target, api_key=key) as client:
            with pytest.raises(redmux.UnauthenticatedError):
                await client.generate("abc")
            with pytest.raises(redmux.UnauthenticatedError):
                async for _ in client.stream("abc"):
                    pass
            with pytest.raises(redmux.UnauthenticatedError):
                await client.info()
            assert await client.health() == "serving"
    async with AsyncClient(target, api_key="two") as client:
        assert (await client.generate("abc", max_tokens=1)).finish_reason == "length"


async def test_reflection_needs_the_key_too(start_server):
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    server = await start_server(api_keys=("one",))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [r async for r in stub.ServerReflectionInfo(iter([request]))]
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_metrics_count_what_was_served(server, client, base, put):
    await put("x", base.adapter(1))
    await asyncio.gather(*(whole(client, adapter=name, max_tokens=5) for name in ("x", None, "x")))
    with pytest.raises(redmux.NotFoundError):
        await whole(client, adapter="y")
    url = f"http://127.0.0.1:{server.metrics_port}/metrics"
    text = (await asyncio.to_thread(urllib.request.urlopen, url)).read().decode()
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines['redmux_requests_total{outcome="length"}']) == 3
    assert float(lines['redmux_requests_refused_total{code="not_found"}']) == 1
    assert float(lines["redmux_time_to_first_token_seconds_count"]) == 3
    assert float(lines["redmux_inter_token_latency_seconds_count"]) == 12
    assert float(lines['redmux_tokens_total{kind="prefill"}']) == 33
    assert float(lines['redmux_tokens_total{kind="decode"}']) == 12
    assert float(lines["redmux_adapters"]) == 1
    assert float(lines["redmux_adapter_load_seconds_count"]) == 1
    assert float(lines["redmux_bank_resident_adapters"]) == 1
    assert float(lines["redmux_kv_cache_used_ratio"]) == 0


def status_of(server, path):
    url = f"http://127.0.0.1:{server.metrics_port}{path}"
    try:
        return urllib.request.urlopen(url).status
    except urllib.error.HTTPError as err:
        with err:
            return err.code


async def test_the_metrics_port_tells_when_the_server_drains_and_when_its_engine_is_dead(
    server, client
):
    async def states():
        paths = "/readyz", "/healthz", "/other"
        return [await asyncio.to_thread(status_of, server, path) for path in paths]

    assert await states() == [200, 200, 404]
    stream = client.stream("abc", max_tokens=200, ignore_eos=True)
    await anext(stream)
    forward, may_end = server.model.runner.forward, threading.Event()
    server.model.runner.forward = lambda work: may_end.wait() and forward(work)
    draining = asyncio.create_task(server.stop(drain_s=60))
    while server.state is not State.DRAINING:
        await asyncio.sleep(0)
    assert await states() == [503, 200, 404]
    server.engine.died.set()
    assert await states() == [503, 503, 404]
    server.engine.died.clear()
    may_end.set()
    await stream.aclose()
    await draining


async def test_info_tells_model_choices_and_limits(server, client, base):
    info = await client.info()
    assert info.base_fingerprint == base.fingerprint
    assert info.bit_identical
    assert (info.vocab_size, info.max_context, info.max_running) == (260, 256, 16)
    assert any("packed" in choice for choice in info.choices)


async def test_a_request_ended_by_a_stop_text_counts_as_stopped(server, client, base, put):
    await put("x", base.adapter(3))
    stop = (await whole(client, adapter="x")).text[9:12]
    await whole(client, adapter="x", stop=[stop], max_tokens=200)
    while server.engine.num_open:
        await asyncio.sleep(0)
    counted = server.metrics.registry.get_sample_value
    assert counted("redmux_requests_total", {"outcome": "stop"}) == 1
    assert counted("redmux_requests_total", {"outcome": "cancelled"}) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_other_precisions_are_served_by_the_torch_attention(dtype, start_server, base):
    from redmux_adapters import Adapter, to_bytes

    server = await start_server(dtype=dtype)
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        info = await client.info()
        assert (info.dtype, info.bit_identical) == (dtype, False)
        adapter = Adapter(info.base_fingerprint, base.adapter(1).edits)
        await client.adapters.put("x", to_bytes(adapter))
        got = await client.generate("abc", adapter="x", max_tokens=5, ignore_eos=True)
    assert len(got.token_ids) == 5
