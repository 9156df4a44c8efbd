"""`redmux train` as people run it, on a tiny random model."""

import csv
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from reference import generate

from redmux.cli import main as redmux
from redmux.errors import InvalidArgumentError
from redmux_adapters import read_adapter
from redmux_adapters.train.cli import main
from redmux_adapters.train.job import read_job
from redmux_adapters.train.metrics_log import MetricsLog


@pytest.fixture
def data(tmp_path):
    """Twenty questions with the same answer."""
    path = tmp_path / "data.jsonl"
    lines = [{"prompt": f"question {i}", "completion": "y"} for i in range(20)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def common(tiny_folder):
    return ["--base", str(tiny_folder), "--batch-size", "4"]


def metrics(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


async def test_what_is_trained_is_served(data, common, tmp_path, base, client, put, capsys):
    output = tmp_path / "yes"
    about = ["--description", "Says yes.", "--license", "CC0-1.0"]
    code = redmux(["train", str(data), "--output", str(output), *common, "--steps", "60",
                   "--learning-rate", "0.1", "--eval-every", "20", *about])  # fmt: skip
    assert code == 0
    adapter = read_adapter(output)
    assert adapter.base_fingerprint == base.fingerprint
    assert adapter.metadata.description == "Says yes."
    assert adapter.metadata.training.startswith("60 steps, ")
    assert adapter.metadata.evaluation.startswith("2 held-out examples: loss ")
    out = capsys.readouterr().out
    assert "adapter: 384 values at 3 sites, 18 examples, 2 held out, 60 steps of 4, lr 0.1" in out
    assert "estimate: " in out
    assert f"{output}: {adapter.digest}" in out
    assert not (output / "checkpoint.pt").exists()
    await put("yes", adapter)
    message = [{"role": "user", "content": "question 99"}]
    answer = await client.generate(message, adapter="yes", max_tokens=8)
    prompt = base.tokenizer("[user]question 99[assistant]", add_special_tokens=False)["input_ids"]
    tokens, _ = generate(base.model, prompt, 8, adapter.edits, eos=(0,))
    assert answer.text == base.tokenizer.decode(tokens, skip_special_tokens=True)
    assert answer.text.startswith("y")


async def test_what_is_trained_for_some_tokens_edits_these_when_it_is_served(
    data, common, tmp_path, base, client, put
):
    output = tmp_path / "late"
    code = redmux(["train", str(data), "--output", str(output), *common, "--steps", "4",
                   "--learning-rate", "0.1", "--apply", "after:[assistant]"])  # fmt: skip
    assert code == 0
    adapter = read_adapter(output)
    assert adapter.apply == "after:[assistant]"
    assert ", apply after:[assistant]" in adapter.metadata.training
    await put("late", adapter)
    answer = await client.generate(
        [{"role": "user", "content": "question 99"}], adapter="late", max_tokens=8
    )
    prompt = base.tokenizer("[user]question 99[assistant]", add_special_tokens=False)["input_ids"]
    where = range(len(prompt) - 1, 1000)
    tokens, _ = generate(base.model, prompt, 8, adapter.edits, eos=(0,), where=where)
    assert answer.text == base.tokenizer.decode(tokens, skip_special_tokens=True)
    assert main([str(data), "--output", str(tmp_path / "x"), *common, "--check-data",
                 "--apply", "after:<nowhere>"]) == 1  # fmt: skip


def test_a_killed_run_goes_on_to_the_same_bits(data, common, tmp_path, capsys):
    def command(folder):
        return ["train", str(data), "--output", str(tmp_path / folder), *common, "--steps", "40",
                "--eval-every", "1", "--checkpoint-every", "3"]  # fmt: skip

    process = subprocess.Popen(
        [sys.executable, "-m", "redmux", *command("killed")], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert any(" step 10:" in line for line in process.stdout)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "adapter_config.json").exists()
    assert redmux(command("killed")) == 1  # nothing is lost by starting it again
    assert "holds an interrupted run" in capsys.readouterr().err

    assert redmux([*command("killed"), "--resume"]) == 0
    assert "of them done" in capsys.readouterr().out
    assert redmux([*command("whole"), "--resume"]) == 0  # where there is nothing to resume
    killed, whole = (read_adapter(tmp_path / name) for name in ("killed", "whole"))
    assert killed.digest == whole.digest
    rows = {name: metrics(tmp_path / name) for name in ("killed", "whole")}
    told = ("task", "step", "split", "loss", "learning_rate", "grad_norm")
    assert [[row[key] for key in told] for row in rows["killed"]] == [
        [row[key] for key in told] for row in rows["whole"]
    ]


def test_a_sweep_trains_every_rate_and_ranks_them(data, common, tmp_path, capsys):
    code = main([str(data), "--output", str(tmp_path / "out"), *common, "--steps", "10",
                 "--sweep", "0.0001,0.1", "--name", "yes"])  # fmt: skip
    assert code == 0
    slow, fast = (read_adapter(tmp_path / "out" / f"yes-lr{rate}") for rate in ("0.0001", "0.1"))
    assert slow.digest != fast.digest
    assert "lr 0.1," in fast.metadata.training
    ranking = capsys.readouterr().out.splitlines()[-2:]
    assert [line.partition(":")[0] for line in ranking] == ["yes-lr0.1", "yes-lr0.0001"]


def test_a_job_file_trains_its_tasks_together(data, common, tmp_path, tiny_folder):
    (tmp_path / "other.csv").write_text("q,a\n" + "why,because\n" * 12)
    job = tmp_path / "job.toml"
    job.write_text(f"""
base = "{tiny_folder}"
output = "out"
[defaults]
steps = 3
batch_size = 4
[[tasks]]
name = "yes"
data = "data.jsonl"
[[tasks]]
name = "why"
data = "other.csv"
columns = {{prompt = "q", completion = "a"}}
valid_share = 0
learning_rate = 0.05
prompt_format = {{user = ["<u>", ""], assistant = ["<a>", ""]}}
""")
    assert main(["--job", str(job)]) == 0
    yes, why = (read_adapter(tmp_path / "out" / name) for name in ("yes", "why"))
    assert (yes.prompt_format, why.prompt_format.user.prefix) == (None, "<u>")
    assert why.metadata.evaluation == ""
    rows = metrics(tmp_path / "out")
    assert {(row["task"], row["split"]) for row in rows} == {
        ("yes", "train"), ("yes", "valid"), ("why", "train"),
    }  # fmt: skip
    alone = [str(data), "--output", str(tmp_path / "alone"), *common, "--steps", "3"]
    assert main(alone) == 0
    for site, edit in read_adapter(tmp_path / "alone").edits.items():
        torch.testing.assert_close(edit.scale, yes.edits[site].scale, rtol=0, atol=1e-5)


def test_bad_data_is_told_before_anything_is_written(data, common, tmp_path, capsys):
    data.write_text(data.read_text() + '\n{"prompt": "a", "completion": ""}\nnonsense\n')
    command = [str(data), "--output", str(tmp_path / "out"), *common, "--steps", "1"]
    assert main(command) == 1
    _, _, told = capsys.readouterr().err.partition("redmux train: ")
    lines = told.splitlines()
    assert lines[0].startswith("2 unusable record(s)")
    assert lines[1] == "data.jsonl:21: completion is empty"
    assert lines[2].startswith("data.jsonl:22: not valid JSON")
    assert not (tmp_path / "out").exists()
    assert main([*command, "--skip-bad"]) == 0
    assert "left out data.jsonl:21: completion is empty" in capsys.readouterr().err


async def test_a_training_goes_on_from_an_adapter_and_is_served(
    data, common, tmp_path, base, client, put, capsys
):
    turns = {"user": ["<u>", ""], "assistant": ["<a>", ""]}
    job = tmp_path / "job.json"
    task = {"name": "first", "data": "data.jsonl", "prompt_format": turns, "learning_rate": 0.1}
    job.write_text(
        json.dumps({"output": "out", "base": common[1], "tasks": [{**task, "steps": 20}]})
    )
    assert main(["--job", str(job)]) == 0
    first = read_adapter(tmp_path / "out")
    capsys.readouterr()
    more = [str(data), *common, "--start", str(tmp_path / "out"), "--steps", "8",
            "--train", "ln", "--eval-every", "4"]  # fmt: skip
    assert main([*more, "--output", str(tmp_path / "more")]) == 0
    adapter = read_adapter(tmp_path / "more")
    assert adapter.prompt_format == first.prompt_format  # as it was trained before
    assert adapter.metadata.training.endswith(f", started from {first.digest}")
    assert len(adapter.sites) == 2 * len(first.sites)
    await put("more", adapter)
    prompt = "<u>question 99<a>"
    answer = await client.generate(prompt, adapter="more", max_tokens=6, ignore_eos=True)
    ids = base.tokenizer(prompt)["input_ids"]
    tokens, _ = generate(base.model, ids, 6, adapter.edits)
    assert answer.text == base.tokenizer.decode(tokens, skip_special_tokens=True)

    plain = [part for part in more if part not in ("--train", "ln")]
    assert main([*plain, "--layers", "0", "--output", str(tmp_path / "x")]) == 1
    assert "edits model.layers.1.mlp.down_proj, which is not among" in capsys.readouterr().err


def test_data_can_be_checked_without_the_weights(data, common, tmp_path, monkeypatch, capsys):
    from redmux_adapters.train import preparation

    monkeypatch.setattr(preparation, "load_training_base", None)
    check = [str(data), *common, "--output", str(tmp_path / "out"), "--steps", "8", "--check-data"]
    assert main(check) == 0
    out = capsys.readouterr().out
    assert "adapter: 18 examples, 2 held out, of at most " in out
    assert out.endswith(" tokens, 3 sites, 8 steps of 4\n")
    assert not (tmp_path / "out").exists()
    assert main([*check, "--layers", "7"]) == 1
    assert "no layer 7" in capsys.readouterr().err
    assert main([*check, "--train", "head"]) == 1
    assert "trains its head alone" in capsys.readouterr().err
    data.write_text(data.read_text() + '\n{"prompt": "a"}\n' + json.dumps(
        {"prompt": "x" * 600, "completion": "y"}
    ))  # fmt: skip
    assert main(check) == 1
    err = capsys.readouterr().err
    assert "data.jsonl:21: completion is missing" in err
    assert "data.jsonl:22: too long" in err


def test_a_dry_run_writes_nothing(data, common, tmp_path, capsys):
    assert main([str(data), "--output", str(tmp_path / "out"), *common, "--dry-run"]) == 0
    assert "estimate: " in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_run_whose_adapter_diverges_fails(data, common, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("redmux_adapters.train.learner.MAX_MAGNITUDE", 1.0)
    command = [str(data), "--output", str(tmp_path / "out"), *common, "--steps", "9"]
    assert main([*command, "--learning-rate", "9"]) == 1
    assert "adapter diverged at step 0: a value beyond 1" in capsys.readouterr().out
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert main([*command, "--sweep", "9,0.001"]) == 0  # another rate went through


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "x"], "give DATA and --output"),
        (["d.jsonl", "--output", "x", "--steps", "0"], "steps is 0"),
        (["d.txt", "--output", "x"], "cannot tell the format"),
        (["d.jsonl", "--output", "x", "--device", "gpu"], "cpu, cuda or cuda:N"),
        (["--job", "none.toml"], "cannot read none.toml"),
        (["--job", "none.toml", "--steps", "3"], "set in the job file"),
        (["d.jsonl", "--output", "x", "--name", "../up"], "task name '../up'"),
    ],
)
def test_mistakes_on_the_command_line_are_one_error(arguments, message, capsys):
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output = 1 2", "neither valid TOML nor JSON"),
        ("tasks = 3", "has no list of tasks"),
        ('output = "x"\ntasks = []', "at least one task"),
        ('outputs = "x"\ntasks = [{}]', "unknown key 'outputs' in job.toml; did you mean 'output'"),
        ('output = "x"\ntasks = [{name = "a"}]', "task 'a' has no data"),
        ('tasks = [{name = "a", data = "d"}]', "has no output"),
        ('output = "x"\ntasks = [{name = "a", data = "d", step = 3}]', "did you mean 'steps'"),
        ('output = "x"\ntasks = [{name = "a", data = "d", epochs = "3"}]', "task 'a': epochs is"),
        ('output = "x"\ntasks = [{name="a", data="d"}, {name="a", data="d"}]', "different names"),
        ('output = "x"\ndtype = "int8"\ntasks = [{name="a", data="d"}]', "float32, bfloat16"),
    ],
)
def test_mistakes_in_a_job_file_are_told(text, message, tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(text)
    with pytest.raises(InvalidArgumentError, match=message):
        read_job(path, {})


def test_labels_need_an_encoder(common, tmp_path, capsys):
    (tmp_path / "labels.csv").write_text("text,label\na,1\nb,2\n")
    assert main([str(tmp_path / "labels.csv"), "--output", str(tmp_path / "out"), *common]) == 1
    assert "a decoder, which learns from prompt and completion" in capsys.readouterr().err


def test_tensorboard_is_asked_for_only_where_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidArgumentError, match="pip install tensorboard"):
        MetricsLog(tmp_path, {}, tensorboard=True)
