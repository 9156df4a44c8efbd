"""Models, adapters and their files, tokens, and what probes ask."""

import re

import openai
import pytest

from redmux.cli import main
from redmux_adapters import to_bytes, write_folder
from redmux_server.http_api.names import ModelNames

BYTES = {"content-type": "application/octet-stream"}


async def test_models_are_the_base_and_the_adapters_with_their_parent(api, base, put, server):
    await put("a/b", base.adapter(1))
    listed = {model.id: model async for model in api.models.list()}
    tiny = listed["tiny"]
    assert tiny.parent is None
    assert tiny.root == server.config.model
    assert listed["a/b"].parent == "tiny"
    assert listed["a/b"].root == base.adapter(1).digest
    assert (await api.models.retrieve("a/b")).id == "a/b"
    for name in ("tiny", "gpt-4o", server.config.model):
        assert (await api.models.retrieve(name)).id == "tiny"
    with pytest.raises(openai.NotFoundError, match="did you mean 'a/b'") as caught:
        await api.models.retrieve("a/c")
    assert caught.value.code == "model_not_found"


async def test_an_adapter_called_like_the_base_is_reached_behind_the_colon(api, base, put, server):
    await put("tiny", base.adapter(4))
    assert (await api.models.retrieve("tiny")).parent is None
    found = await api.models.retrieve("tiny:tiny")
    assert found.root == base.adapter(4).digest
    names = ModelNames("base", ["alias"], server.registry)
    assert names.adapter("alias:x:y") == "x:y"
    assert names.adapter("other:x") == "other:x"


async def test_an_adapter_is_put_read_listed_and_deleted(http, base):
    data = to_bytes(base.adapter(7))
    put = await http.put("/v1/adapters/x/y", content=data, headers=BYTES)
    assert put.status_code == 201, put.text
    assert put.json()["digest"] == base.adapter(7).digest == put.headers["x-redmux-adapter"]
    assert (await http.put("/v1/adapters/x/y", content=data)).status_code == 200
    other = to_bytes(base.adapter(8))
    taken = await http.put("/v1/adapters/x%2Fy", content=other)
    assert taken.status_code == 409
    assert taken.headers["x-should-retry"] == "false"
    replaced = await http.put("/v1/adapters/x%2Fy?replace=true", content=other)
    assert replaced.status_code == 201
    told = (await http.get("/v1/adapters/x/y")).json()
    assert told["digest"] == base.adapter(8).digest
    file = await http.get("/v1/adapters/x/y", headers={"accept": "application/octet-stream"})
    assert (await http.put("/v1/adapters/x/z", content=file.content)).json()["digest"] == told[
        "digest"
    ]
    page = (await http.get("/v1/adapters?limit=1&after=x/x")).json()
    assert ([a["id"] for a in page["data"]], page["has_more"]) == (["x/y"], True)
    assert page["last_id"] == "x/y"
    gone = await http.delete("/v1/adapters/x/y")
    assert gone.json() == {"id": "x/y", "object": "adapter.deleted", "deleted": True}
    assert (await http.get("/v1/adapters/x/y")).status_code == 404
    assert (await http.delete("/v1/adapters/x/y")).status_code == 404


async def test_a_folder_is_packed_for_a_plain_put_and_the_refusal_says_how(
    http, base, tmp_path, capsys
):
    write_folder(base.adapter(9), tmp_path / "x")
    bare = (tmp_path / "x" / "adapter_model.safetensors").read_bytes()
    refused = await http.put("/v1/adapters/packed", content=bare)
    assert refused.status_code == 400
    told = refused.json()["error"]["message"]
    command = re.search(r"`redmux (adapters pack FOLDER --output FILE.safetensors)`", told)
    paths = {"FOLDER": str(tmp_path / "x"), "FILE.safetensors": str(tmp_path / "x.safetensors")}
    assert main([paths.get(word, word) for word in command[1].split()]) == 0, capsys.readouterr()
    packed = (tmp_path / "x.safetensors").read_bytes()
    assert (await http.put("/v1/adapters/packed", content=packed)).status_code == 201
    asked = {"model": "packed", "prompt": "a", "max_tokens": 2}
    answer = (await http.post("/v1/completions", json=asked)).json()
    assert answer["redmux"]["digest"] == base.adapter(9).digest


async def test_what_is_no_adapter_is_refused(http):
    for content, headers, status in (
        (b"", BYTES, 400), (b"junk", BYTES, 400), (b"x" * 2_000_000, BYTES, 413),
        (b"{}", {"content-type": "application/json"}, 400),
    ):  # fmt: skip
        response = await http.put("/v1/adapters/junk", content=content, headers=headers)
        assert response.status_code == status, response.text
    assert (await http.put("/v1/adapters/Not%20a%20name", content=b"x")).status_code == 400
    for query in ("limit=0", "limit=1001", "limit=x"):
        response = await http.get(f"/v1/adapters?{query}")
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "limit"


async def test_tokens_and_text_are_turned_into_each_other(http, model):
    asked = {"model": model, "prompt": "añb", "return_token_strs": True}
    told = (await http.post("/tokenize", json=asked)).json()
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"]) == 4
    assert told["max_model_len"] == 256
    back = await http.post("/detokenize", json={"model": model, "tokens": told["tokens"]})
    assert back.json() == {"prompt": "añb"}
    chat = {"model": model, "messages": [{"role": "user", "content": "x"}]}
    told = (await http.post("/tokenize", json=chat)).json()
    back = await http.post("/detokenize", json={"model": model, "tokens": told["tokens"]})
    assert back.json() == {"prompt": "[user]x[assistant]"}
    for body in ({"tokens": [1 << 70]}, {"tokens": [-1]}, {"tokens": ["a"]}, {"tokens": 1}):
        response = await http.post("/detokenize", json={"model": model, **body})
        assert response.status_code == 400, response.text


async def test_probes_are_answered_without_a_key(http, server):
    assert (await http.get("/health")).json() == {"status": "serving"}
    assert (await http.get("/ready")).status_code == 200
    assert set((await http.get("/version")).json()) == {"version"}
    assert "redmux_requests_running" in (await http.get("/metrics")).text


async def test_the_gateway_is_told_who_runs(http, api, base, put, server):
    await put("gateway/one", base.adapter(11))
    stream = await api.completions.create(
        model="gateway/one",
        prompt="a",
        max_tokens=200,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    async for _ in stream:
        break
    text = "".join(
        f"{sample.name}{sample.labels}" for metric in server.metrics.registry.collect()
        for sample in metric.samples if sample.name.startswith("vllm:")
    )  # fmt: skip
    await stream.close()
    assert "vllm:lora_requests_info" in text
    assert "'running_lora_adapters': 'gateway/one'" in text
    shown = (await http.get("/metrics")).text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert f'vllm:{name}{{model_name="tiny"}}' in shown


async def test_the_document_describes_every_path(http):
    document = (await http.get("/openapi.json")).json()
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings",
                 "/v1/models", "/v1/models/{model}", "/v1/adapters/{name}", "/tokenize",
                 "/detokenize", "/classify", "/score", "/pooling", "/v1/load_lora_adapter",
                 "/unload_lora_adapter", "/health", "/metrics"):  # fmt: skip
        assert path in document["paths"], path
    fields = document["components"]["schemas"]["ChatBody"]["properties"]
    assert fields["store"]["description"] == "Accepted without effect."
    assert (await http.get("/docs")).status_code == 200


async def test_a_model_that_is_deleted_is_an_adapter_that_is_gone(api, base, put, server):
    await put("old/one", base.adapter(9))
    deleted = await api.models.delete("old/one")
    assert (deleted.id, deleted.deleted, deleted.object) == ("old/one", True, "model")
    assert not await server.registry.has("old/one")
    with pytest.raises(openai.NotFoundError):
        await api.models.delete("old/one")
    with pytest.raises(openai.PermissionDeniedError, match="base model"):
        await api.models.delete("tiny")
