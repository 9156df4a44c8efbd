"""What is refused, with which error, before anything is queued."""

import asyncio
import copy

import grpc
import pytest
import torch

import redmux
from redmux import AsyncClient
from redmux.v1 import inference_service_pb2 as pb
from redmux_adapters import Adapter, Edit, fingerprint, to_bytes

CASES = {
    "unknown adapter": ({"adapter": "nope"}, redmux.NotFoundError, "no adapter 'nope'"),
    "unknown digest": ({"adapter": "sha256:00"}, redmux.NotFoundError, "sha256:00"),
    "empty prompt": ({"prompt": ""}, redmux.InvalidArgumentError, "empty"),
    "too long prompt": ({"prompt": "x" * 300}, redmux.InvalidArgumentError, "300 tokens"),
    "giant prompt": ({"prompt": "x" * 99999}, redmux.InvalidArgumentError, "99999 bytes"),
    "too many tokens": ({"max_tokens": 256}, redmux.InvalidArgumentError, "at most 256"),
    "no tokens": ({"max_tokens": 0}, redmux.InvalidArgumentError, "max_tokens is 0"),
    "id out of vocabulary": ({"prompt": [3, 260]}, redmux.InvalidArgumentError, r"\[1\] = 260"),
    "negative id": ({"prompt": [-1]}, redmux.InvalidArgumentError, r"\[0\] = -1"),
    "stop id": ({"stop_token_ids": [999]}, redmux.InvalidArgumentError, "stop_token_ids"),
    "NaN temperature": ({"temperature": float("nan")}, redmux.InvalidArgumentError, "temperature"),
    "infinite temperature": ({"temperature": float("inf")}, redmux.InvalidArgumentError, "temper"),
    "negative temperature": ({"temperature": -1.0}, redmux.InvalidArgumentError, "temperature"),
    "top_p of zero": ({"top_p": 0.0}, redmux.InvalidArgumentError, "top_p"),
    "NaN top_p": ({"top_p": float("nan")}, redmux.InvalidArgumentError, "top_p"),
    "negative top_k": ({"top_k": -1}, redmux.InvalidArgumentError, "top_k"),
    "stop strings": ({"stop": ["x"] * 17}, redmux.InvalidArgumentError, "stop has 17 strings"),
    "long stop": ({"stop": ["x" * 200]}, redmux.InvalidArgumentError, "200 bytes"),
    "empty stop": ({"stop": [""]}, redmux.InvalidArgumentError, "0 bytes"),
    "role": (
        {"prompt": [{"role": "wizard", "content": "x"}]}, redmux.InvalidArgumentError, "wizard",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
async def test_a_bad_request_is_refused_before_it_is_queued(case, server, client):
    options, error, message = CASES[case]
    options = {"prompt": "abc", **options}
    with pytest.raises(error, match=message):
        await client.generate(**options)
    with pytest.raises(error, match=message):
        async for _ in client.stream(**options):
            pass
    assert server.engine.num_open == 0
    assert (await client.generate("abc", max_tokens=1)).usage.completion_tokens == 1


def vectors(base, change):
    return {site: change(edit) for site, edit in base.adapter(1).edits.items()}


def site_named(base, name):
    edits = dict(base.adapter(1).edits)
    edits[name] = edits.pop("model.layers.0.mlp.down_proj")
    return edits


ADAPTERS = {
    "wrong base": (
        lambda b: Adapter(base_fingerprint="llama-1x1-00", edits=b.adapter(1).edits),
        redmux.WrongBaseError, "llama-1x1-00",
    ),
    "wrong size": (
        lambda b: Adapter(b.fingerprint, vectors(b, lambda e: Edit.identity(7))),
        redmux.InvalidAdapterError, "7",
    ),
    "unknown site": (
        lambda b: Adapter(b.fingerprint, site_named(b, "model.layers.0.mlp.down_prj")),
        redmux.InvalidAdapterError, "down_prj",
    ),
}  # fmt: skip


async def test_adapters_of_a_relative_need_the_operator_s_word_and_are_listed_as_such(
    base, start_server
):
    old = "-".join(base.fingerprint.split("-")[:3])
    relative = fingerprint(_with_a_merged_lora(base.model))
    edits = base.adapter(1).edits
    ours, older, theirs = (to_bytes(Adapter(b, edits)) for b in (base.fingerprint, old, relative))
    server = await start_server()
    async with redmux.AsyncClient(f"127.0.0.1:{server.port}") as client:
        with pytest.raises(redmux.WrongBaseError, match="--allow-other-base"):
            await client.adapters.put("theirs", theirs)
    server = await start_server(allow_other_base=True)
    async with redmux.AsyncClient(f"127.0.0.1:{server.port}") as client:
        for name, data in (("ours", ours), ("older", older), ("theirs", theirs)):
            put = await client.adapters.put(name, data)
            assert put == await client.adapters.get(name)
        listed = {adapter.name: adapter.base_match async for adapter in client.adapters.list()}
        assert listed == {"ours": "same", "older": "unverified", "theirs": "other"}
        both = [await client.generate("abc", adapter=n, max_tokens=4) for n in ("ours", "theirs")]
        assert both[0].token_ids == both[1].token_ids


def _with_a_merged_lora(model):
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        weight = layer.self_attn.q_proj.weight
        weight.addmm_(torch.randn(len(weight), 1), 0.01 * torch.randn(1, weight.shape[1]))
    return model


@pytest.mark.parametrize("case", ADAPTERS)
async def test_an_unfit_adapter_is_refused_and_not_published(case, base, client):
    make, error, message = ADAPTERS[case]
    with pytest.raises(error, match=message):
        await client.adapters.put("x", to_bytes(make(base)))
    assert [a async for a in client.adapters.list()] == []


async def test_values_that_are_not_finite_are_refused(base, client):
    data = bytearray(to_bytes(base.adapter(1)))
    data[-4:] = b"\x00\x00\xc0\x7f"  # a quiet NaN as the last value
    with pytest.raises(redmux.InvalidAdapterError, match="non-finite"):
        await client.adapters.put("x", bytes(data))


async def test_a_giant_adapter_is_refused(base, client):
    with pytest.raises((redmux.InvalidAdapterError, redmux.ResourceExhaustedError)):
        await client.adapters.put("x", b"\0" * (3 << 20))


@pytest.mark.parametrize("name", ["", "../x", "A", "a/b/c", "x" * 65, "x\n", "a//b", "/a"])
async def test_a_bad_name_is_refused(name, base, client):
    with pytest.raises(redmux.InvalidArgumentError, match="name"):
        await client.adapters.put(name, to_bytes(base.adapter(1)))


async def test_other_content_needs_replace(base, client, put):
    first = await put("x", base.adapter(1))
    assert await put("x", base.adapter(1)) == first
    with pytest.raises(redmux.AlreadyExistsError, match="replace"):
        await put("x", base.adapter(2))
    assert (await client.adapters.get("x")).digest == first.digest
    assert (await put("x", base.adapter(2), replace=True)).digest != first.digest


async def test_a_full_queue_says_when_to_come_back(start_server):
    server = await start_server(max_running=1, max_batch_tokens=8, max_queue=3)
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        calls = [client.generate("abc", max_tokens=100, ignore_eos=True) for _ in range(8)]
        results = await asyncio.gather(*calls, return_exceptions=True)
    refused = [r for r in results if isinstance(r, Exception)]
    assert len(refused) == 5
    assert all(isinstance(r, redmux.ResourceExhaustedError) for r in refused)
    assert all(r.retry_after_s > 0 for r in refused)


async def test_bytes_that_are_no_message_are_an_invalid_argument(server):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        for method in ("Complete", "Generate"):
            call = channel.unary_stream(f"/redmux.v1.InferenceService/{method}")(b"\xff\xff\xff")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_request_without_a_prompt_is_refused(server):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = channel.unary_unary("/redmux.v1.InferenceService/Complete")
        for request in (pb.CompleteRequest(), pb.CompleteRequest(generation={"chat": {}})):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(request.SerializeToString())
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_an_internal_error_shows_an_id_and_nothing_else(server, client):
    server.registry.resolve = lambda name, tenant: 1 / 0
    with pytest.raises(redmux.RedmuxError, match=r"^internal error, id [0-9a-f]{12}$"):
        await client.generate("a secret", adapter="x")
