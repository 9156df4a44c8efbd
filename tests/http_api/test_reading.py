"""Vectors, classes and scores over HTTP, of a decoder and of an encoder with heads."""

import base64

import numpy as np
import openai
import pytest


async def test_vectors_come_as_the_openai_package_asks_for_them(api, client, model, base):
    there = await client.embed(["ab", "c"], normalize=True)
    here = await api.embeddings.create(model=model, input=["ab", "c"])  # base64 by default
    assert [d.index for d in here.data] == [0, 1]
    for ours, theirs in zip(here.data, there.vectors, strict=True):
        assert ours.embedding == pytest.approx(list(theirs), abs=1e-6)
        assert np.linalg.norm(ours.embedding) == pytest.approx(1, abs=1e-5)
    assert here.usage.prompt_tokens == 3
    ids = [base.tokenizer(text)["input_ids"] for text in ("ab", "c")]
    floats = await api.embeddings.create(model=model, input=ids, encoding_format="float")
    assert [d.embedding for d in floats.data] == [
        pytest.approx(d.embedding, abs=1e-6) for d in here.data
    ]
    assert len((await api.embeddings.create(model=model, input="ab")).data) == 1


async def test_without_a_format_vectors_are_numbers(http, model):
    body = {"model": model, "input": ["a"], "pooling": "mean", "normalize": False}
    told = (await http.post("/v1/embeddings", json=body)).json()
    assert isinstance(told["data"][0]["embedding"][0], float)
    packed = (await http.post("/v1/embeddings", json={**body, "encoding_format": "base64"})).json()
    values = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    assert values.tolist() == told["data"][0]["embedding"]


async def test_a_part_of_a_vector_is_refused_with_the_reason(api, model):
    with pytest.raises(openai.BadRequestError, match="dimensions is not served: a vector has"):
        await api.embeddings.create(model=model, input="a", dimensions=4)


@pytest.mark.parametrize(
    "fields", [{"input": []}, {"input": 1}, {"input": [1.5]}, {"input": ["a", [1]]},
               {"input": [[]]}, {"input": [999_999]}, {"pooling": "max"}, {"normalize": "yes"},
               {"input": ["a"] * 5000}],
)  # fmt: skip
async def test_what_is_no_input_is_refused(http, model, fields):
    body = {"model": model, "input": "a", **fields}
    response = await http.post("/v1/embeddings", json=body)
    assert response.status_code == 400, response.text


async def test_a_decoder_classifies_nothing_and_says_so(http, model):
    for path in ("/classify", "/pooling"):
        body = {"model": model, "input": "a", **({"task": "classify"} if path[1] == "p" else {})}
        response = await http.post(path, json=body)
        assert response.status_code == 412
        message = response.json()["error"]["message"]  # not in gRPC's names
        assert message.endswith("which classifies nothing; use /v1/completions")


async def test_classes_are_those_of_grpc(reading, reader):
    _, client = reader
    for name in ("mood", "topic", "tags", "rating"):
        there = await client.classify(["one two", "three"], adapter=name)
        body = {"model": name, "input": ["one two", "three"]}
        here = (await reading.post("/classify", json=body)).json()
        for ours, theirs in zip(here["data"], there.results, strict=True):
            assert ours["probs"] == pytest.approx(list(theirs.scores), abs=1e-6)
            assert ours["num_classes"] == len(there.labels)
            assert ours["label"] == there.labels[int(np.argmax(ours["probs"]))]
        assert here["redmux"]["adapter"] == name
        pooled = await reading.post("/pooling", json={**body, "task": "classify"})
        assert [d["data"] for d in pooled.json()["data"]] == [d["probs"] for d in here["data"]]


async def test_a_pair_is_scored_by_the_head_or_by_the_angle_of_its_vectors(reading, reader):
    _, client = reader
    asked = {"text_1": "one", "text_2": ["two", "one"]}
    pairs = [("one", "two"), ("one", "one")]
    for name, place in (("mood", 1), ("rating", 0)):
        there = await client.classify(pairs, adapter=name)
        expected = [c.scores[place] for c in there.results]
        for path in ("/score", "/v1/score"):
            here = (await reading.post(path, json={"model": name, **asked})).json()
            scores = [d["score"] for d in here["data"]]
            assert scores == pytest.approx(expected, abs=1e-6)
    here = (await reading.post("/score", json={"model": "bert", **asked})).json()
    assert here["data"][1]["score"] == pytest.approx(1, abs=1e-5)
    renamed = {"model": "bert", "queries": "one", "documents": ["two", "one"]}
    assert (await reading.post("/score", json=renamed)).json()["data"] == here["data"]
    response = await reading.post("/score", json={"model": "topic", **asked})
    assert response.status_code == 412
    for wrong in ({"text_1": ["a", "b", "c"]}, {"text_2": []}, {"text_1": 1}):
        response = await reading.post("/score", json={"model": "mood", **asked, **wrong})
        assert response.status_code == 400, response.text


async def test_an_encoder_generates_nothing_and_says_so(reading):
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/responses", {"input": "a"}),
        ("/tokenize", {"prompt": "a"}),
    ):
        response = await reading.post(path, json={"model": "bert", **body})
        assert response.status_code == 412, path
        assert "Embed" not in response.json()["error"]["message"]


async def test_vectors_wait_behind_requests_that_are_more_important(http, server, monkeypatch):
    seen = []
    submit = server.engine.submit

    def noting(*requests):
        seen.extend(request.priority for request in requests)
        submit(*requests)

    monkeypatch.setattr(server.engine, "submit", noting)
    pair = {"text_1": "a", "text_2": "b"}
    for path, read in (("/v1/embeddings", {"input": "a"}), ("/pooling", {"input": "a"}),
                       ("/score", pair)):  # fmt: skip
        for priority in (7, None):
            asked = {"model": "tiny", "priority": priority, **read}
            assert (await http.post(path, json=asked)).is_success
            assert set(seen) == {priority or 0}
            seen.clear()
        refused = await http.post(path, json=asked | {"priority": 101})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "priority"


async def test_so_do_classes(reading, reader, monkeypatch):
    server, _ = reader
    seen = []
    submit = server.engine.submit
    monkeypatch.setattr(
        server.engine,
        "submit",
        lambda *some: (seen.extend(r.priority for r in some), submit(*some)),
    )
    for path, read in (("/classify", {"input": "a"}), ("/score", {"text_1": "a", "text_2": "b"}),
                       ("/pooling", {"input": "a", "task": "classify"})):  # fmt: skip
        response = await reading.post(path, json={"model": "mood", "priority": -7, **read})
        assert response.is_success
    assert seen == [-7] * 3


async def test_classes_and_scores_are_what_the_document_says(reading, fits):
    document = (await reading.get("/openapi.json")).json()
    pair = {"text_1": "a", "text_2": ["b", "c"]}
    for path, model, body in (
        ("/classify", "mood", {"input": ["a", "b"]}), ("/classify", "tags", {"input": "a"}),
        ("/classify", "rating", {"input": "a"}), ("/score", "rating", pair),
        ("/v1/score", "bare", pair), ("/score", "topic", pair),
        ("/pooling", "topic", {"input": "a", "task": "classify"}),
        ("/pooling", "bare", {"input": "a", "encoding_format": "base64"}),
        ("/v1/completions", "bert", {"prompt": "a"}), ("/v1/models", "", None),
    ):  # fmt: skip
        if body is None:
            operation, response = document["paths"][path]["get"], await reading.get(path)
        else:
            operation = document["paths"][path]["post"]
            response = await reading.post(path, json={"model": model, **body})
        fits(document, operation, response)
