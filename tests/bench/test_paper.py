"""The paper's recipes: their table, splits and metrics, and GLUE and E2E from end to end, tiny."""

import argparse
import json
import math
import sys
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
from encoders import save_tiny_encoder
from tokenizers_at_hand import BOS, EOS, make

from redmux_adapters.train.job import make_task, read_job
from redmux_adapters.train.prompts import PromptWriter

FOLDER = Path(__file__).parents[2] / "bench" / "paper"


@pytest.fixture
def paper(monkeypatch):
    """Imports a module of bench/paper, which is no package."""
    monkeypatch.syspath_prepend(FOLDER)

    names = ("glue", "glue_data", "glue_metrics", "e2e")
    hidden = {name: sys.modules.pop(name, None) for name in names}  # a folder of tests is e2e, too

    def load(name):
        return __import__(name)

    yield load
    for name, module in hidden.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("accuracy", 5 / 8),
        ("f1", 2 * 3 / (2 * 3 + 2 + 1)),
        # (tp tn - fp fn) / sqrt((tp + fp)(tp + fn)(tn + fp)(tn + fn))
        ("matthews", (3 * 2 - 2 * 1) / math.sqrt(5 * 4 * 4 * 3)),
    ],
)
def test_metrics_of_labels_are_those_of_their_definitions(paper, metric, expected):
    predicted, right = [1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 1, 0, 0]
    assert paper("glue_metrics").score(metric, predicted, right) == pytest.approx(100 * expected)


def test_correlations_are_those_of_their_definitions(paper):
    score = paper("glue_metrics").score
    predicted, right = [1.0, 2.0, 2.0, 9.0], [0.5, 0.7, 3.0, 4.0]
    covariance = np.cov(predicted, right)
    pearson = covariance[0, 1] / math.sqrt(covariance[0, 0] * covariance[1, 1])
    assert score("pearson", predicted, right) == pytest.approx(100 * pearson)
    ranks = np.cov([1, 2.5, 2.5, 4], [1, 2, 3, 4])
    spearman = ranks[0, 1] / math.sqrt(ranks[0, 0] * ranks[1, 1])
    assert score("spearman", predicted, right) == pytest.approx(100 * spearman)
    assert score("matthews", [1, 1], [1, 0]) == 0


@pytest.mark.parametrize("name", ["rte", "cola"])
def test_the_validation_set_is_halved_as_the_authors_do(paper, name):
    records = [{"text": str(i)} for i in range(7)]
    valid, test = paper("glue_data")._halves(name, records, 43)
    order = np.random.RandomState(seed=43).permutation(7).tolist()
    first, rest = order[:3], order[3:]
    expected = (rest, first) if name == "cola" else (first, rest)
    assert tuple([int(r["text"]) for r in half] for half in (valid, test)) == expected


def test_large_validation_sets_give_a_thousand_to_choose_by(paper):
    valid, test = paper("glue_data")._halves("qnli", [{"text": "a"}] * 5463, 42)
    assert (len(valid), len(test)) == (1000, 4463)


def test_the_authors_rates_are_in_the_table():
    recipes = tomllib.loads((FOLDER / "recipes.toml").read_text())
    rates = {name: value["learning_rate"] for name, value in recipes["glue"]["roberta-base"].items()
             if name not in ("options", "redpp")}  # fmt: skip
    assert rates == {  # table 13 of the paper
        "mnli": 1e-3, "sst2": 1e-3, "mrpc": 5e-3, "cola": 5e-3, "qnli": 3e-3, "qqp": 1e-3,
        "rte": 8e-3, "stsb": 3e-3,
    }  # fmt: skip
    task = read_job(FOLDER / "ultrafeedback.toml", {}).tasks[0]
    assert (task.options.learning_rate, task.options.batch_size) == (1e-3, 128)  # table 10


def test_instruction_tuning_begins_prompts_with_bos_as_the_authors_do():
    task = read_job(FOLDER / "ultrafeedback.toml", {}).tasks[0]
    writer = PromptWriter(make(frame="begin"), task.data.prompt_format)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    inputs, targets = writer.chat(messages[:-1], "b")
    assert (inputs[0], inputs.count(BOS)) == (BOS, 1)
    assert targets[-1] == EOS


def write_glue(folder):
    """Tiny files as the data sets have them: SST-2, and RTE of pairs with two training files."""
    for name in ("sst2", "rte"):
        (folder / name).mkdir(parents=True)
    lines = [f"{'good' if i % 2 else 'bad'} number {i}\t{i % 2}" for i in range(20)]
    for part in ("train", "dev"):
        (folder / "sst2" / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    header = "index\tsentence1\tsentence2\tlabel\n"
    pairs = [
        f"{i}\tIt is {i}.\tIt is {i + i % 2}.\t{'not_entailment' if i % 2 else 'entailment'}\n"
        for i in range(20)
    ]
    (folder / "rte" / "train.tsv").write_text(header + "".join(pairs))
    (folder / "rte" / "val.tsv").write_text("".join(pairs))
    (folder / "rte" / "dev.tsv").write_text(header + "".join(pairs[:11]))
    return folder


@pytest.mark.slow
def test_glue_runs_to_the_scores_of_served_adapters(paper, tmp_path, monkeypatch, capsys):
    model = save_tiny_encoder(tmp_path / "encoder", "bert")
    out = tmp_path / "glue.json"
    monkeypatch.setattr(sys, "argv", [
        "glue.py", "--model", str(model), "--data", str(write_glue(tmp_path / "data")),
        "--tasks", "sst2,rte", "--steps", "4", "--work", str(tmp_path / "work"), "--out", str(out),
    ])  # fmt: skip
    assert paper("glue").main() == 0
    rows = {(row["task"], row["method"]): row for row in json.loads(out.read_text())["rows"]}
    assert {method for _, method in rows} == {"majority", "red", "redpp", "head"}
    for task, num_test in (("sst2", 10), ("rte", 6)):
        # bert: 2 layers of 64 values, RED at one site of each, RED++ at five; scale and bias
        sizes = [rows[task, method]["values"] for method in ("head", "red", "redpp")]
        assert sizes == [0, 2 * 2 * 64, 2 * 2 * 64 * 5]
        for method in ("red", "redpp", "head"):
            assert rows[task, method]["num_test"] == num_test
            assert rows[task, method]["as_trained"] is True
    assert rows["rte", "majority"]["valid"].keys() == {"accuracy"}


def test_the_server_is_compared_with_the_evaluation_that_was_kept(paper, tmp_path):
    is_as_trained = paper("glue")._is_as_trained
    log = tmp_path / "metrics.csv"
    log.write_text(
        "task,step,split,accuracy,correlation\n"
        "cola,0,valid,0.7,0.1\ncola,5,train,,\ncola,5,valid,0.6,0.3\ncola,9,valid,0.8,0.3\n"
        "sst2,0,valid,0.5,\nsst2,5,valid,0.9,\n"
    )

    def row(accuracy):
        return {"valid": {"accuracy": accuracy}, "num_valid": 10}

    assert is_as_trained(log, "cola", row(60)) is True  # the best correlation, and its first
    assert is_as_trained(log, "cola", row(80)) is False
    assert is_as_trained(log, "sst2", row(90)) is True
    assert is_as_trained(log, "stsb", {"valid": {"pearson": 0.5}}) is None


def test_glue_chooses_by_the_first_metric_of_the_papers_table(paper):
    options = argparse.Namespace(recipe="roberta-base", steps=None, seed=1, model="m", device="cpu")
    split = types.SimpleNamespace(train=[{}] * 64)
    tasks = paper("glue")._tasks(options, dict.fromkeys(("cola", "stsb", "rte"), split), ["red"])
    chosen = {task["name"]: task["metric"] for task in tasks}
    assert chosen == {"cola-red": "matthews", "stsb-red": "pearson", "rte-red": "accuracy"}


@pytest.mark.parametrize("recipe", ["gpt2-medium", "gpt2-large"])
def test_e2e_on_gpt2_warms_up_for_500_steps_as_the_authors_do(paper, recipe):
    options = argparse.Namespace(
        recipe=recipe, methods="red,redpp", steps=None, seed=1, is_chat=False, model="m",
        device="cpu",
    )  # fmt: skip
    for task in paper("e2e")._tasks(options):
        values = {key: value for key, value in task.items() if key != "name"}
        assert make_task(task["name"], values).options.warmup_steps == 500


@pytest.mark.slow
def test_e2e_runs_to_the_scores_of_served_texts(paper, tmp_path, monkeypatch, tiny_folder):
    data = tmp_path / "data.csv"
    rows = [f'"name[{i}], area[{i}]",It is {i}.' for i in range(12) for _ in range(2)]
    data.write_text("\n".join(["mr,ref", *rows]) + "\n")
    out = tmp_path / "e2e.json"
    files = [part for name in ("train", "valid", "test") for part in (f"--{name}", str(data))]
    monkeypatch.setattr(sys, "argv", [
        "e2e.py", "--model", str(tiny_folder), *files, "--limit-test", "3", "--steps", "2",
        "--work", str(tmp_path / "work"), "--out", str(out),
    ])  # fmt: skip
    assert paper("e2e").main() == 0
    told = {row["method"]: row for row in json.loads(out.read_text())["rows"]}
    assert told.keys() == {"red", "redpp"}
    assert told["red"]["values"] < told["redpp"]["values"]
    groups = (tmp_path / "work" / "references.txt").read_text().split("\n\n")
    assert [group.split() for group in groups] == [["It", "is", f"{i}."] * 2 for i in range(3)]
    for row in told.values():
        assert row["num_texts"] == 3
        assert 0 <= row["bleu"] <= 100
