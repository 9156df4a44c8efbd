"""Classifiers from their data to the server's answers, on tiny encoders of real architectures."""

import json
import math

import pytest
from encoders import save_tiny_encoder

from redmux.cli import main as redmux
from redmux_adapters import read_adapter

# Of a pair, the label tells whether both texts are the same: without token types BERT would be
# asked about another input than it was trained on.
WORDS = ["red", "green", "blue", "white", "black"]
PAIRS = [(one, other) for one in WORDS for other in WORDS]


@pytest.fixture(params=["bert", "roberta", "distilbert"])
def encoder_folder(request, tmp_path):
    return save_tiny_encoder(tmp_path / "encoder", request.param)


@pytest.fixture
async def server(start_server, encoder_folder):
    return await start_server(
        model=str(encoder_folder), max_running=16, max_batch_tokens=64, threads=1
    )


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.mark.parametrize("form", ["text", "pair"])
async def test_a_served_classifier_gives_the_labels_that_its_training_counted(
    server, client, encoder_folder, tmp_path, form
):
    inputs = PAIRS if form == "pair" else [" ".join(pair) for pair in PAIRS]
    labels = ["same" if one == other else "different" for one, other in PAIRS]
    records = [
        {"label": label, "text": pair[0], "text_pair": pair[1]} if form == "pair"
        else {"label": label, "text": " ".join(pair)}
        for pair, label in zip(PAIRS, labels, strict=True)
    ]  # fmt: skip
    data = write(tmp_path / "data.jsonl", records)
    output = tmp_path / "adapter"
    code = redmux([
        "train", str(data), "--valid", str(data), "--base", str(encoder_folder),
        "--output", str(output), "--steps", "12", "--batch-size", "8", "--eval-every", "4",
        "--learning-rate", "0.05", "--metric", "accuracy",
    ])  # fmt: skip
    assert code == 0
    adapter = read_adapter(output)
    await client.adapters.put("trained", output)
    answer = await client.classify(inputs, adapter="trained")
    right = sum(r.label == label for r, label in zip(answer.results, labels, strict=True))
    assert f"accuracy {100 * right / len(labels):.1f} %" in adapter.metadata.evaluation
    loss = sum(
        -math.log(r.scores[adapter.head.config.labels.index(label)])
        for r, label in zip(answer.results, labels, strict=True)
    )
    told = float(adapter.metadata.evaluation.split("loss ")[1].split(",")[0])
    assert loss / len(labels) == pytest.approx(told, abs=1e-3)
