"""Tokens over gRPC: what completions begin with, and the same as over HTTP."""

import httpx2
import pytest
from encoders import save_tiny_encoder

from redmux import AsyncClient, FailedPreconditionError, InvalidArgumentError
from redmux.v1 import inference_service_pb2 as pb
from redmux_adapters import to_bytes


@pytest.fixture
async def doors(start_server, base):
    """A client, and HTTP of the same server, which has an adapter."""
    server = await start_server(http_port=0)
    async with (
        AsyncClient(f"127.0.0.1:{server.port}") as client,
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.http_port}") as http,
    ):
        await client.adapters.put("one", to_bytes(base.adapter(1)))
        yield client, http


CHAT = [{"role": "user", "content": "x"}]


async def test_a_prompt_has_the_tokens_that_its_completion_counts(doors):
    client, _ = doors
    for prompt in ("añb", CHAT):
        found = await client.tokenize(prompt, adapter="one")
        done = await client.generate(prompt, adapter="one", max_tokens=1, prompt_logprobs=0)
        assert found.token_ids[1:] == done.prompt.token_ids
        assert len(found.token_ids) == done.usage.prompt_tokens
        assert found.added_special_tokens == done.usage.added_special_tokens
        assert (found.adapter, found.digest) == ("one", done.digest)


async def test_both_doors_tell_the_same_tokens_and_the_same_text(doors):
    client, http = doors
    model = (await http.get("/v1/models")).json()["data"][0]["id"]
    for body, prompt, options in (
        ({"prompt": "añb"}, "añb", {}),
        ({"prompt": "añb", "add_special_tokens": False}, "añb", {"add_special_tokens": False}),
        ({"messages": CHAT}, CHAT, {}),
        ({"messages": CHAT, "add_generation_prompt": False}, CHAT,
         {"add_generation_prompt": False}),
    ):  # fmt: skip
        asked = {"model": model, "return_token_strs": True, **body}
        told = (await http.post("/tokenize", json=asked)).json()
        found = await client.tokenize(prompt, token_texts=True, **options)
        assert told == {
            "count": len(found.token_ids), "tokens": list(found.token_ids),
            "token_strs": list(found.token_texts), "max_model_len": found.max_context,
        }  # fmt: skip
        back = await http.post("/detokenize", json={"model": model, "tokens": told["tokens"]})
        assert back.json()["prompt"] == await client.detokenize(found.token_ids)


async def test_both_doors_refuse_the_same_in_the_same_words(doors):
    client, http = doors
    model = (await http.get("/v1/models")).json()["data"][0]["id"]
    wrong = {"model": model, "messages": CHAT, "add_special_tokens": True}
    told = (await http.post("/tokenize", json=wrong)).json()["error"]
    assert told["param"] == "add_special_tokens"
    with pytest.raises(InvalidArgumentError) as caught:
        await client.tokenize(CHAT, add_special_tokens=True)
    assert str(caught.value) == told["message"]
    for ids in ([-1], [1 << 30], [0] * 5000):
        told = await http.post("/detokenize", json={"model": model, "tokens": ids})
        assert told.json()["error"]["param"] == "tokens"
        with pytest.raises(InvalidArgumentError) as caught:
            await client.detokenize(ids)
        assert told.json()["error"]["message"].endswith(str(caught.value).removeprefix("token_ids"))


async def test_a_request_without_a_prompt_is_refused(doors):
    client, _ = doors
    with pytest.raises(InvalidArgumentError, match="set text or chat"):
        await client._connection.unary(
            client._connection.inference.Tokenize, pb.TokenizeRequest(), 60
        )


async def test_an_encoder_says_where_its_tokens_are_counted(start_server, tmp_path):
    server = await start_server(model=str(save_tiny_encoder(tmp_path / "model", "bert")))
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        with pytest.raises(FailedPreconditionError, match="usage of Embed"):
            await client.tokenize("a")
