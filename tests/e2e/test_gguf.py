"""A GGUF file is served and trained with the tokenizer of its model, or with the one given."""

import json

import pytest
from gguf_files import chaining, write_gguf

import redmux_server.app  # noqa: F401 - before its kernels would be looked for in the test's cache
from redmux import AsyncClient
from redmux.errors import InvalidArgumentError
from redmux.training import TrainingTask
from redmux_adapters.bases.load import load_tokenizer
from redmux_adapters.train.cli import main as train

pytestmark = pytest.mark.timeout(600)  # a process that trains has to import and to load
TEXT = "a  12 b"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REDMUX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def unknown(tmp_path):
    """A model that nobody knows how to cut text for, and the folder of its tokenizer."""
    files = {
        pre: write_gguf(tmp_path / f"{pre}.gguf", *chaining(TEXT), pre=pre, seed=1)
        for pre in ("telepathy", "smollm")
    }
    original = tmp_path / "original"
    load_tokenizer(str(files["smollm"])).save_pretrained(original)
    return str(files["telepathy"]), str(original)


async def test_a_server_takes_the_given_tokenizer_for_a_file_whose_own_is_not_known(
    unknown, start_server
):
    model, tokenizer = unknown
    with pytest.raises(InvalidArgumentError, match=r"telepathy.*--tokenizer"):
        await start_server(model=model, kv_cache_tokens=256)
    server = await start_server(model=model, tokenizer=tokenizer, kv_cache_tokens=256)
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        answer = await client.generate(TEXT, max_tokens=1)
        examples = [{"prompt": TEXT, "completion": "b"}] * 4
        job = await client.jobs.create(
            [TrainingTask("a", examples, options={"steps": 1, "batch_size": 2})]
        )
        last = [event async for event in client.jobs.watch(job.id)][-1]
    assert answer.usage.prompt_tokens == len(["a", "  ", "1", "2", " b"])
    assert (last.state, last.is_success) == ("finished", True)


def test_training_takes_the_given_tokenizer_for_a_file_whose_own_is_not_known(
    unknown, tmp_path, capsys
):
    model, tokenizer = unknown
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": TEXT, "completion": "b"}) + "\n")
    command = [str(data), "--base", model, "--output", str(tmp_path / "out"), "--steps", "1",
               "--valid-share", "0", "--dry-run"]  # fmt: skip
    assert train(command) == 1
    assert "--tokenizer" in capsys.readouterr().err
    assert train([*command, "--tokenizer", tokenizer]) == 0
