"""Classify and Embed on a tiny encoder: what they take, refuse and give up."""

import asyncio
import re
import threading
from pathlib import Path

import pytest
import torch
from encoders import SEP, load_tiny_encoder, save_tiny_encoder

import redmux
from redmux import (
    AsyncClient,
    FailedPreconditionError,
    InvalidAdapterError,
    InvalidArgumentError,
    NotFoundError,
)
from redmux_adapters import Adapter, Head, HeadConfig, to_bytes


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    return load_tiny_encoder(save_tiny_encoder(tmp_path_factory.mktemp("bert"), "bert"))


@pytest.fixture
async def server(start_server, encoder):
    return await start_server(
        model=str(encoder.folder), max_running=4, max_batch_tokens=16, max_queue=8, threads=1
    )


async def test_the_kind_follows_from_the_configuration(client):
    info = await client.info()
    assert (info.kind, info.architecture) == ("encoder", "BertModel")
    # No prompt is cut, so a step takes the longest one whatever the budget says.
    assert (info.max_context, info.max_batch_tokens) == (130, 130)


async def test_an_encoder_refuses_to_generate(client):
    with pytest.raises(FailedPreconditionError, match="encoder, which generates nothing"):
        await client.generate("x")
    with pytest.raises(FailedPreconditionError, match="encoder, which generates nothing"):
        async for _ in client.stream("x"):
            pass
    with pytest.raises(FailedPreconditionError, match="encoder, which generates nothing"):
        await client.score("x", ["y"])


async def test_classify_says_why_an_adapter_cannot(encoder, client, put):
    await put("bare", encoder.adapter(1))
    with pytest.raises(NotFoundError, match="no adapter 'bar'; did you mean 'bare'"):
        await client.classify(["x"], adapter="bar")
    with pytest.raises(NotFoundError, match="no adapter 'bar'"):
        await client.embed(["x"], adapter="bar")
    with pytest.raises(FailedPreconditionError, match="'bare' has no classification head"):
        await client.classify(["x"], adapter="bare")


async def test_a_head_for_another_hidden_size_is_refused_when_it_is_put(encoder, client, put):
    config = HeadConfig("mean", ["a", "b"], "single_label_classification")
    tensors = {"classifier.weight": torch.ones(2, 48), "classifier.bias": torch.ones(2)}
    foreign = Adapter(encoder.fingerprint, encoder.adapter(1).edits, head=Head(config, tensors))
    message = r"shape \[2, 48\]; for 2 labels and hidden size 64 it has to be \[2, 64\]"
    with pytest.raises(InvalidAdapterError, match=message):
        await put("foreign", foreign)
    with pytest.raises(NotFoundError):
        await client.adapters.get("foreign")


async def test_a_head_on_the_pooler_needs_a_base_that_has_one(encoder, start_server, tmp_path):
    from transformers import BertForMaskedLM

    BertForMaskedLM(encoder.model.config).save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    base = load_tiny_encoder(tmp_path)
    server = await start_server(model=str(tmp_path), threads=1)
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        with pytest.raises(FailedPreconditionError, match="pooler, and this base model has none"):
            await client.adapters.put("a", to_bytes(base.adapter(1, "bert")))
        await client.adapters.put("a", to_bytes(base.adapter(1, "mean")))


async def test_impossible_inputs_are_refused_before_anything_is_queued(client, server):
    for inputs, message in (
        ([], "no inputs"),
        ([[]], r"inputs\[0\] is empty"),
        (["x", [1, 300]], r"inputs\[1\].token_ids\[1\] = 300 is outside \[0, 300\)"),
        (["x", "y" * 129], r"inputs\[1\] has 131 tokens; limit 130"),
        (["y" * 2081], r"inputs\[0\] has 2081 bytes; limit 2080"),
        (["x"] * 11, "11 inputs; limit 10"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            await client.embed(inputs)
        assert server.engine.num_open == 0


@pytest.fixture
def held(server, monkeypatch):
    """Holds the first step of the engine until it is set; counts the steps that began."""
    hidden, go_on = type(server.model.runner).hidden, threading.Event()
    go_on.num_steps = 0

    def hold(runner, work):
        go_on.num_steps += 1
        assert go_on.wait(60)
        return hidden(runner, work)

    monkeypatch.setattr(type(server.model.runner), "hidden", hold)
    yield go_on
    go_on.set()


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


async def test_a_caller_that_goes_away_is_not_computed_for(client, server, held):
    """A step takes one of the eight inputs."""
    call = asyncio.create_task(client.embed(["x" * 100] * 8))
    await until(lambda: held.num_steps)
    call.cancel()
    await until(call.done)
    await until(lambda: server.engine.num_open == 8 and all_ended(server))
    held.set()
    await until(lambda: server.engine.num_open == 0)
    assert held.num_steps == 1
    assert server.model.bank.num_uses == 0
    assert len((await client.embed(["x"])).vectors) == 1


def all_ended(server):
    return all(request.early_end is not None for request in server.engine._open)


async def test_a_deadline_ends_a_request(client, server, held):
    with pytest.raises(redmux.DeadlineExceededError):
        await client.embed(["x" * 100] * 8, timeout_s=0.5)
    await until(lambda: all_ended(server))
    held.set()
    await until(lambda: server.engine.num_open == 0)
    assert held.num_steps <= 1


async def test_the_python_of_the_document_runs(encoder, server, client, put, capsys):
    adapter = encoder.adapter(1, "mean", labels=["human", "number"])
    await put("questions", adapter)
    text = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    await asyncio.to_thread(exec, code.replace("localhost:50051", f"127.0.0.1:{server.port}"), {})
    *labels, applied, cosine = capsys.readouterr().out.splitlines()
    assert [line.split()[0] in ("human", "number") for line in labels] == [True, True]
    assert applied.startswith(f"questions {adapter.digest} ")
    assert -1.001 < float(cosine) < 1.001


async def test_token_ids_are_computed_as_they_stand(encoder, client):
    ids = encoder.tokenizer("Hello")["input_ids"]
    assert ids[-1] == SEP
    text, as_ids, bare = (await client.embed(["Hello", ids, ids[1:-1]])).vectors
    assert text == as_ids
    assert bare != text
