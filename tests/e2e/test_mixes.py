"""Mixes of adapters in requests, against the files that `redmux adapters mix` writes."""

import asyncio

import httpx2
import pytest
from reference import generate

from redmux import AsyncClient, Mix, MixPart, NotFoundError
from redmux.cli import main as redmux
from redmux.errors import InvalidArgumentError
from redmux_adapters import read_adapter, to_bytes, write_folder

PROMPT = "What is for dinner, and who are you?"
OPTIONS = {"max_tokens": 8, "ignore_eos": True, "logprobs": True}
MIXES = [
    Mix({"a": 0.7, "b": 0.3}),
    Mix({"b": 0.3, "a": 0.7}),
    Mix({"a": 1, "b": 0.5}, "compose"),
    Mix({"b": 0.5, "a": 1}, "compose"),
    Mix([MixPart("a", 1, [0, 2])], strength=0.5),
    Mix({"a": 1}),
    Mix({"a": 0}),
]


def bits(answer):
    return answer.token_ids, answer.logprobs


@pytest.fixture
async def adapters(base, put):
    found = {name: base.adapter(seed) for name, seed in (("a", 1), ("b", 2))}
    for name, adapter in found.items():
        await put(name, adapter)
    return found


async def test_a_mix_is_the_file_that_the_command_writes_alone_and_in_any_batch(
    base, client, put, adapters, tmp_path
):
    for name, adapter in adapters.items():
        write_folder(adapter, tmp_path / name)
    alone = [await client.generate(PROMPT, adapter=mix, **OPTIONS) for mix in MIXES]
    for number, (mix, answer) in enumerate(zip(MIXES, alone, strict=True)):
        parts = [str(MixPart(str(tmp_path / p.adapter), p.weight, p.layers)) for p in mix.parts]
        folder = tmp_path / f"mix{number}"
        assert redmux(["adapters", "mix", *parts, "--how", mix.how, "--strength",
                       str(mix.strength), "--output", str(folder)]) == 0  # fmt: skip
        written = read_adapter(folder)
        assert (answer.digest, answer.adapter) == (written.digest, str(mix))
        await put("written", written, replace=True)
        assert bits(await client.generate(PROMPT, adapter="written", **OPTIONS)) == bits(answer)
        ids = base.tokenizer(PROMPT)["input_ids"]
        tokens, logprobs = generate(base.model, ids, 8, written.edits)
        assert list(answer.token_ids) == tokens
        assert list(answer.logprobs) == pytest.approx(logprobs, abs=1e-3)
    assert bits(alone[0]) == bits(alone[1])
    assert bits(alone[2]) != bits(alone[3])
    assert bits(alone[5]) == bits(await client.generate(PROMPT, adapter="a", **OPTIONS))
    assert bits(alone[6]) == bits(await client.generate(PROMPT, **OPTIONS))
    mixed = await asyncio.gather(
        *(client.generate(PROMPT, adapter=mix, **OPTIONS) for mix in MIXES * 2)
    )
    assert [bits(answer) for answer in mixed] == [bits(answer) for answer in alone] * 2


async def test_a_mix_is_pinned_to_the_versions_that_its_parts_have(base, client, put, adapters):
    before = await client.generate(PROMPT, adapter=MIXES[0], **OPTIONS)
    await put("a", base.adapter(7), replace=True)
    after = await client.generate(PROMPT, adapter=MIXES[0], **OPTIONS)
    assert after.digest != before.digest
    old = Mix([MixPart("a@1", 0.7), MixPart(adapters["b"].digest, 0.3)])
    again = await client.generate(PROMPT, adapter=old, **OPTIONS)
    assert (again.digest, bits(again)) == (before.digest, bits(before))


async def test_every_call_takes_a_mix(client, adapters):
    mix = MIXES[0]
    scores = await client.score(PROMPT, [" Yes"], adapter=mix)
    vectors = await client.embed([PROMPT], adapter=mix)
    assert scores.digest == vectors.digest
    assert (await client.score(PROMPT, [" Yes"])).continuations != scores.continuations


async def test_http_takes_the_same_mix(client, server, adapters):
    mix = {"parts": [{"adapter": "a", "weight": 0.7}, {"adapter": "b", "weight": 0.3}]}
    expected = await client.generate(PROMPT, adapter=MIXES[0], max_tokens=8, ignore_eos=True)
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "ignore_eos": True, "mix": mix}
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.http_port}") as http:
        base = (await http.get("/v1/models")).json()["data"][0]["id"]
        answer = await http.post("/v1/completions", json=body | {"model": base})
        told = answer.json()["redmux"]
        assert answer.json()["choices"][0]["text"] == expected.text
        assert told["digest"] == answer.headers["x-redmux-adapter"] == expected.digest
        vector = await http.post("/v1/embeddings", json={"model": base, "input": "a", "mix": mix})
        assert vector.json()["redmux"]["digest"] == expected.digest
        for model, wrong, said in (
            ("a", mix, "model is the adapter 'a' and mix has others"),
            (base, mix | {"strength": 101}, "the strength of the mix is 101"),
            (base, mix | {"how": "stack"}, "how"),
            (base, {"parts": []}, "parts"),
        ):
            refused = await http.post("/v1/completions", json=body | {"model": model, "mix": wrong})
            assert refused.status_code == 400
            assert said in refused.json()["error"]["message"]
            assert refused.json()["error"]["param"].startswith("mix")


async def test_what_cannot_be_mixed_is_refused_and_harms_nothing(base, client, put, adapters):
    await put("late", base.adapter(3, apply="generation"))
    for mix, error, said in (
        (Mix({"a": 1, "nobody": 1}), NotFoundError, "no adapter 'nobody'"),
        (Mix({"a": 1, "late": 1}), InvalidArgumentError, "have to edit the same tokens"),
        (Mix([MixPart("a", 1, [9])]), InvalidArgumentError, "edits nothing in the layers 9"),
    ):
        with pytest.raises(error, match=said):
            await client.generate(PROMPT, adapter=mix, **OPTIONS)
    assert (await client.generate(PROMPT, adapter="a", **OPTIONS)).token_ids


async def test_another_tenants_adapter_is_no_part_of_a_mix(base, start_server):
    server = await start_server(api_keys=("k" * 20, "l" * 20))
    target = f"127.0.0.1:{server.port}"
    async with (
        AsyncClient(target, api_key="k" * 20) as mine,
        AsyncClient(target, api_key="l" * 20) as other,
    ):
        await mine.adapters.put("a", to_bytes(base.adapter(1)))
        await other.adapters.put("b", to_bytes(base.adapter(2)))
        with pytest.raises(NotFoundError):
            await other.generate(PROMPT, adapter=Mix({"a": 0.5, "b": 0.5}))
        digest = base.adapter(1).digest
        with pytest.raises(NotFoundError):
            await other.generate(PROMPT, adapter=Mix({digest: 0.5, "b": 0.5}))
