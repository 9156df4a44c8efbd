"""The real SmolLM2-135M with the bundled adapters, in a real server process."""

import contextlib
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import load_reference
from reference import edited

import redmux
from redmux_adapters import read_adapter
from redmux_server.registry.given import zoo_folder

pytestmark = pytest.mark.model

TOKENS = 14


@contextlib.contextmanager
def serving(*options):
    command = [sys.executable, "-m", "redmux", "serve", "--adapters", "zoo", "--port", "0",
               "--http-port", "0", "--metrics-port", "0", *options]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serving .* on [^ ]+:(\d+),", line):
                break
        else:
            pytest.fail("".join(lines))
        yield f"localhost:{found[1]}"
        process.terminate()
        process.stderr.read()


@pytest.fixture(scope="module")
def target():
    with serving() as target:
        yield target


@pytest.fixture(scope="module")
def real():
    return load_reference("smollm2")


@pytest.fixture(scope="module")
def work():
    """(adapter name or None, user message): every bundled adapter, and some for the base model."""
    demo = json.loads((zoo_folder() / "demo.json").read_text())
    jobs = [(d["adapter"], d["prompt"]) for d in demo[::2]]
    return jobs + [(None, prompt) for _, prompt in jobs[::2]]


def ask(client, job):
    adapter, prompt = job
    messages = [{"role": "user", "content": prompt}]
    return client.generate(messages, adapter=adapter, max_tokens=TOKENS, logprobs=True)


@pytest.fixture(scope="module")
def alone(target, work):
    with redmux.Client(target) as client:
        return [ask(client, job) for job in work]


def test_there_are_bundled_adapters_and_each_says_what_it_is(target):
    with redmux.Client(target) as client:
        adapters = list(client.adapters.list())
        assert client.info().num_adapters == len(adapters) >= 4
    for adapter in adapters:
        assert adapter.description
        folder = zoo_folder() / adapter.name
        assert "Held-out result" in (folder / "README.md").read_text()
        assert read_adapter(folder).digest == adapter.digest


def test_the_readme_shows_what_the_bundled_adapters_say(target):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    code, shown = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", readme, re.S).groups()
    message = {"role": "user", "content": re.search(r'^text = "(.*)"$', code, re.M)[1]}
    adapters = re.search(r"^for adapter in \((.*)\):$", code, re.M)[1]
    with redmux.Client(target) as client:
        answers = [
            client.generate([message], adapter=name).text
            for name in re.findall(r'"(.*?)"', adapters)
        ]
    assert answers == shown.splitlines()


def test_bundled_adapters_give_what_plain_transformers_gives(real, alone, work):
    for (name, prompt), got in zip(work, alone, strict=True):
        adapter = read_adapter(zoo_folder() / name) if name else None
        messages = [{"role": "user", "content": prompt}]
        if adapter is not None and adapter.prompt_format is not None:
            text = adapter.prompt_format.render(messages)
        else:
            text = real.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        ids = real.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with edited(real.model, adapter.edits if adapter else {}), torch.inference_mode():
            out = real.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        tokens = out.sequences[0, ids.shape[1] :].tolist()
        logprobs = [
            float(torch.log_softmax(row[0], -1)[token])
            for row, token in zip(out.logits, tokens, strict=True)
        ]
        assert list(got.token_ids) == tokens, name
        assert got.logprobs == pytest.approx(logprobs, abs=1e-3), name
        assert got.digest == (adapter and adapter.digest)


def test_every_bit_is_the_same_in_a_mixed_batch(target, alone, work):
    with redmux.Client(target) as client:
        assert client.info().bit_identical
        with ThreadPoolExecutor(len(work)) as pool:
            for order in (work, work[::-1]):
                mixed = list(pool.map(lambda job: ask(client, job), order))
                expected = alone if order is work else alone[::-1]
                assert mixed == expected


def test_adapters_change_what_is_said(alone, work):
    by_prompt = {}
    for (name, prompt), got in zip(work, alone, strict=True):
        by_prompt.setdefault(prompt, {})[name] = got.text
    pairs = [texts for texts in by_prompt.values() if len(texts) == 2]
    assert pairs
    assert all(len(set(texts.values())) == 2 for texts in pairs)


def scores(target, alone, work):
    """The log-probabilities of the answers that fp32 gave, token by token."""
    rows = []
    with redmux.Client(target) as client:
        for (name, prompt), answer in zip(work, alone, strict=True):
            messages = [{"role": "user", "content": prompt}]
            scored = client.score(messages, [list(answer.token_ids)], adapter=name)
            rows.append(scored.continuations[0].logprobs)
    return rows


def test_scoring_an_answer_gives_the_bits_that_generating_it_gave(target, alone, work):
    assert scores(target, alone, work) == [answer.logprobs for answer in alone]


@pytest.mark.slow
def test_int8_finds_the_same_answers_about_as_likely(alone, work):
    with serving("--quantization", "int8") as target:
        rounded = scores(target, alone[::2], work[::2])
    for got, answer in zip(rounded, alone[::2], strict=True):
        distance = torch.tensor(got) - torch.tensor(answer.logprobs)
        assert 0 < distance.abs().mean() < 0.2
