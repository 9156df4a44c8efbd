"""lm-eval over /v1/completions and /v1/chat/completions, its numbers beside direct ones."""

import json
import math
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

# Sums of some twenty log-probabilities in fp32, computed in two orders.
TOLERANCE = 1e-3
DOCUMENTS = [
    {"question": "The capital of France is", "choices": ["Paris", "Rome", "a river"], "gold": 0},
    {"question": "Two and two make", "choices": ["five", "four", "seven"], "gold": 1},
    {"question": "Snow is", "choices": ["hot", "black", "white and cold"], "gold": 2},
    {"question": "The opposite of up is", "choices": ["down", "left", "sideways"], "gold": 0},
]
TASKS = {
    "choices": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "",
        "doc_to_target": "{{question}} {{choices[gold]}}.",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "writing": {
        "output_type": "generate_until", "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n", "Q:"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with the tasks and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("".join(json.dumps(d) + "\n" for d in DOCUMENTS))
    for name, fields in TASKS.items():
        task = {
            "task": name, "dataset_path": "json", "test_split": "test", "num_fewshot": 0,
            "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}}, **fields,
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


@pytest.fixture
def evaluate(tasks, tmp_path):
    """Runs the command; returns the results and the samples of each task."""

    def evaluate(names, *options):
        command = [
            sys.executable, "-m", "lm_eval", "run", "--tasks", *names, "--include_path", str(tasks),
            "--output_path", str(tmp_path), "--log_samples", *options,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        (results,) = tmp_path.rglob("results_*.json")
        samples = {}
        for name in names:
            (file,) = tmp_path.rglob(f"samples_{name}_*.jsonl")
            found = [json.loads(line) for line in file.read_text().splitlines()]
            samples[name] = sorted(found, key=lambda sample: sample["doc_id"])
        return json.loads(results.read_text())["results"], samples

    return evaluate


@pytest.mark.parametrize(("adapter", "batch_size"), [(None, "1"), ("sentiment", "3")])
def test_local_completions_gives_the_numbers_of_a_direct_computation(
    evaluate, direct, url, tokenizer, adapter, batch_size
):
    results, samples = evaluate(
        list(TASKS), "--batch_size", batch_size, "--model", "local-completions", "--model_args",
        f"model={adapter or 'smollm2'},base_url={url}/v1/completions,tokenizer={tokenizer},"
        "tokenizer_backend=huggingface,num_concurrent=3,max_retries=1",
    )  # fmt: skip
    tok = AutoTokenizer.from_pretrained(tokenizer)

    def ids(text):
        return tok(text, add_special_tokens=False)["input_ids"]

    start = [tok.bos_token_id]
    pairs, rolled, prompts = [], [], []
    for doc in DOCUMENTS:
        question = ids(doc["question"])
        for choice in doc["choices"]:
            both = ids(f"{doc['question']} {choice}")
            assert both[: len(question)] == question
            pairs.append([question, both[len(question) :]])
        rolled.append([start, ids(f"{doc['question']} {doc['choices'][doc['gold']]}.")])
        prompts.append([ids(f"Q: {doc['question']}\nA:"), 12])
    told = direct(adapter=adapter, score=pairs + rolled, generate=prompts)

    scores = iter(told["score"])
    best = []
    for doc, sample in zip(DOCUMENTS, samples["choices"], strict=True):
        expected = [next(scores) for _ in doc["choices"]]
        for (ours, is_greedy), (theirs, was_greedy) in zip(
            sample["filtered_resps"], expected, strict=True
        ):
            assert float(ours) == pytest.approx(theirs, abs=TOLERANCE)
            assert str(is_greedy) == str(was_greedy)
        best.append(max(range(3), key=lambda i: expected[i][0]) == doc["gold"])
    assert results["choices"]["acc,none"] == pytest.approx(sum(best) / len(best))

    total, num_bytes = 0, 0
    for doc, sample in zip(DOCUMENTS, samples["rolling"], strict=True):
        expected, _ = next(scores)
        (ours,) = sample["filtered_resps"]
        assert float(ours) == pytest.approx(expected, abs=TOLERANCE)
        total += expected
        num_bytes += len(f"{doc['question']} {doc['choices'][doc['gold']]}.".encode())
    bits = -total / num_bytes / math.log(2)
    assert results["rolling"]["bits_per_byte,none"] == pytest.approx(bits, abs=1e-4)

    for whole, sample in zip(told["generate"], samples["writing"], strict=True):
        assert sample["resps"][0][0] == _cut(whole)


@pytest.mark.parametrize("adapter", [None, "pirate"])
def test_local_chat_completions_gives_what_plain_transformers_write(evaluate, direct, url, adapter):
    _, samples = evaluate(
        ["writing"], "--model", "local-chat-completions", "--apply_chat_template", "--model_args",
        f"model={adapter or 'smollm2'},base_url={url}/v1/chat/completions,num_concurrent=2",
    )  # fmt: skip
    texts = [f"Q: {doc['question']}\nA:" for doc in DOCUMENTS]
    told = direct(adapter=adapter, chat=[[text, 12] for text in texts])
    said = [sample["resps"][0][0] for sample in samples["writing"]]
    assert said == [_cut(text) for text in told["chat"]]


def _cut(text):
    """Returns the text up to the first stop text, as the task has it."""
    return min((text.partition(stop)[0] for stop in ("\n", "Q:")), key=len)
