"""What a server makes of mixes: what it keeps of them, and what it tells other clients."""

import pytest
from encoders import load_tiny_encoder, save_tiny_encoder

import redmux
from redmux import AsyncClient, Mix
from redmux.v1 import inference_service_pb2 as inference_pb
from redmux_adapters import PromptFormat, Turn, to_bytes

OPTIONS = {"max_tokens": 10, "ignore_eos": True, "logprobs": True}
PROMPT = "A prompt that is longer than one block of the cache."


def bits(answer):
    return answer.token_ids, answer.logprobs, answer.digest


@pytest.fixture
async def two(base, put):
    for number, name in enumerate("ab"):
        await put(name, base.adapter(number))


async def test_the_weights_one_and_zero_and_the_strength_zero_are_what_they_say(two, client):
    async def of(adapter):
        return (await client.generate(PROMPT, adapter=adapter, **OPTIONS)).logprobs

    assert await of(Mix({"a": 1})) == await of("a")
    assert await of(Mix({"a": 1, "b": 0})) == await of("a")
    assert await of(Mix({"b": 1, "a": 0}, "compose")) == await of("b")
    assert await of(Mix({"a": 0.7, "b": 3}, strength=0)) == await of(None)


async def test_a_mix_is_computed_once_and_again_when_it_is_no_longer_kept(
    two, server, client, monkeypatch
):
    from redmux_server.services import pinning

    calls = []
    real = pinning.mix

    def counted(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(pinning, "mix", counted)
    mixture, turned = Mix({"a": 0.7, "b": 0.3}), Mix({"b": 0.3, "a": 0.7})
    first = await client.generate(PROMPT, adapter=mixture, **OPTIONS)
    assert bits(await client.generate(PROMPT, adapter=turned, **OPTIONS)) == bits(first)
    assert len(calls) == 1
    server.registry._cache._adapters.clear()
    assert bits(await client.generate(PROMPT, adapter=mixture, **OPTIONS)) == bits(first)
    assert len(calls) == 2


async def test_a_mix_takes_one_row_of_the_bank_and_its_parts_none(two, server, client):
    for _ in range(2):
        await client.generate(PROMPT, adapter=Mix({"a": 0.7, "b": 0.3}), max_tokens=1)
    assert server.model.bank.num_resident == 1


async def test_parts_may_be_digests(two, client, base):
    named = await client.generate(PROMPT, adapter=Mix({"a": 1, "b": 1}), **OPTIONS)
    digests = {base.adapter(n).digest: 1 for n in (0, 1)}
    assert bits(await client.generate(PROMPT, adapter=Mix(digests), **OPTIONS)) == bits(named)


async def test_prompt_formats_that_differ_need_a_choice(client, put, base):
    for number, name in enumerate("ab"):
        turns = PromptFormat(Turn(f"<{name}>", ""), Turn(":", ""))
        await put(name, base.adapter(number, prompt_format=turns))
    chat = [{"role": "user", "content": "Hi"}]
    with pytest.raises(redmux.InvalidArgumentError, match=r"'a' and 'b' .* prompt_from"):
        await client.generate(chat, adapter=Mix({"a": 1, "b": 1}), max_tokens=1)
    mixture = Mix({"a": 1, "b": 1}, prompt_from="b")
    chatted = await client.generate(chat, adapter=mixture, **OPTIONS)
    assert bits(await client.generate("<b>Hi:", adapter=mixture, **OPTIONS)) == bits(chatted)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"adapter": "a", "mix": {"parts": [{"adapter": "a"}]}}, "names the adapter 'a' and a mix"),
        ({"mix": {}}, "the mix has 0 parts"),
        ({"mix": {"parts": [{"adapter": "a"}] * 9}}, "the mix has 9 parts, must be 1 to 8"),
        ({"mix": {"parts": [{}]}}, "has the adapter ''"),
        ({"mix": {"parts": [{"adapter": "a", "weight": float("nan")}]}}, "weight of 'a' .* nan"),
        ({"mix": {"parts": [{"adapter": "a", "layers": [-1]}]}}, "the layers of 'a'"),
        ({"mix": {"parts": [{"adapter": "a", "layers": range(2000)}]}}, "list of 1 to 1024"),
        ({"mix": {"parts": [{"adapter": "a"}], "how": 7}}, "how is 7, which this server lacks"),
        ({"mix": {"parts": [{"adapter": "a"}], "strength": 1e9}}, "strength of the mix is 1"),
        ({"mix": {"parts": [{"adapter": "a"}], "prompt_from": "b"}}, "prompt_from is 'b'"),
    ],
)
async def test_other_clients_are_told_what_is_wrong_with_a_mix(two, client, fields, told):
    connection = client._connection
    for method, request in (
        (connection.inference.Complete, inference_pb.CompleteRequest(
            generation=inference_pb.Generation(text="x", **fields))),
        (connection.inference.Score, inference_pb.ScoreRequest(text="x", **fields)),
        (connection.inference.Embed, inference_pb.EmbedRequest(**fields)),
        (connection.inference.Classify, inference_pb.ClassifyRequest(**fields)),
    ):  # fmt: skip
        with pytest.raises(redmux.InvalidArgumentError, match=told):
            await connection.unary(method, request)


async def test_an_encoder_classifies_by_a_mix_with_the_head_of_one_part(start_server, tmp_path):
    folder = save_tiny_encoder(tmp_path / "encoder", "roberta")
    encoder = load_tiny_encoder(folder)
    server = await start_server(model=str(folder))
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        await client.adapters.put("judge", to_bytes(encoder.adapter(1, "roberta")))
        await client.adapters.put("tone", to_bytes(encoder.adapter(2)))
        alone = await client.classify(["abc"], adapter="judge")
        assert (await client.classify(["abc"], adapter=Mix({"judge": 1}))).results == alone.results
        mixed = await client.classify(["abc"], adapter=Mix({"judge": 1, "tone": 0.5}))
        assert mixed.labels == alone.labels
        assert mixed.results != alone.results
