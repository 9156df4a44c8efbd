"""Tasks that bring their records: what they come to, and how mistakes are named."""

import json
from dataclasses import asdict

import pytest

from redmux.errors import InvalidArgumentError, ResourceExhaustedError
from redmux_adapters import PromptFormat, Turn
from redmux_adapters.train.inline import InlineTask, make_inline_tasks
from redmux_adapters.train.job import Job, make_task
from redmux_adapters.train.preparation import prepare
from redmux_server.training import check
from redmux_server.training.check import JobChecker, TrainingSetup

PAIRS = [{"prompt": f"say {i}", "completion": "yes" * (i % 3 + 1)} for i in range(12)]

LONG = {"prompt": "x" * 3000, "completion": "y"}


@pytest.fixture(scope="module")
def make_checker(tiny_folder):
    def make(max_tokens=10_000_000):
        setup = TrainingSetup(str(tiny_folder), "", "cpu", "float32", 1, "tiny-1", max_tokens)
        return JobChecker(setup)

    return make


@pytest.fixture(scope="module")
def checker(make_checker):
    return make_checker()


def test_inline_records_are_what_the_same_records_in_a_file_are(
    training_base, tiny_folder, tmp_path
):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, PAIRS)))
    options = {"seed": 3, "valid_share": 0.25, "steps": 5, "description": "yes"}
    spec = make_task("a", {"data": str(path), **options})
    (expected,) = prepare(Job((spec,), str(tmp_path / "out"), base=str(tiny_folder))).tasks
    (task,) = make_inline_tasks(training_base, [InlineTask("acme/a", PAIRS, options=options)])
    assert task.identity() == expected.identity()
    assert (task.name, task.metadata) == ("acme/a", expected.metadata)
    assert len(task.valid) == 3


def test_given_held_out_records_are_the_ones_used(training_base):
    (task,) = make_inline_tasks(training_base, [InlineTask("a", PAIRS, valid=PAIRS[:2])])
    assert (len(task.train), len(task.valid)) == (12, 2)


def test_turns_of_a_prompt_format_go_into_the_adapter(training_base):
    turns = {"user": ["<u>", ""], "assistant": ["<a>", ""]}
    (task,) = make_inline_tasks(
        training_base, [InlineTask("a", PAIRS, options={"prompt_format": turns})]
    )
    assert task.prompt_format == PromptFormat(
        user=Turn("<u>", ""), assistant=Turn("<a>", ""), tokens=()
    )


def test_the_check_knows_without_weights_what_training_will_do(checker, training_base):
    inline = [
        InlineTask("a", PAIRS, options={"steps": 7, "valid_share": 0.5}),
        InlineTask("b", PAIRS, options={"batch_size": 5, "epochs": 2, "valid_share": 0}),
    ]
    plans, payload = checker.check(inline)
    tasks = make_inline_tasks(training_base, [InlineTask(**item) for item in json.loads(payload)])
    assert json.loads(payload) == [asdict(item) | {"valid": []} for item in inline]
    assert [(p.name, p.num_steps, p.num_examples, p.num_held_out) for p in plans] == [
        (t.name, t.num_steps, len(t.train), len(t.valid)) for t in tasks
    ]


BAD = [
    ([InlineTask("a", PAIRS, options={"train": "head"})], r"tasks\[0\]: task 'a' trains its head"),
    ([InlineTask("a", PAIRS, options={"metric": "matthews"})], r"tasks\[0\]: .* it learns answers"),
    ([InlineTask("a", [])], r"tasks\[0\]: there are no records"),
    ([], "tasks: there are 0"),
    ([InlineTask("a", PAIRS, options={"steps": 0})], r"tasks\[0\]: steps is 0"),
    ([InlineTask("a", PAIRS, options={"learning_rate": float("nan")})], "learning_rate is nan"),
    ([InlineTask("a", PAIRS), InlineTask("b", PAIRS, options={"layers": "9"})], r"tasks\[1\]: "),
    ([InlineTask("a", PAIRS, options={"sites": "nothing"})], "no linear module matches"),
    ([InlineTask("a", PAIRS, options={"prompt_format": "html"})], "unknown prompt format 'html'"),
    ([InlineTask("a", PAIRS, options={"patience": 2, "valid_share": 0})], "no held-out data"),
    ([InlineTask("a", [{"text": "x", "label": "y"}])], r"tasks\[0\]: the data has text and label"),
    ([InlineTask("a", [{"q": "x"}])], r"tasks\[0\].records\[0\] has the fields q"),
    ([InlineTask("a", [LONG], options={"max_length": 9999})], "too long: .* max_length=256"),
]  # fmt: skip


@pytest.mark.parametrize(("inline", "message"), BAD)
def test_what_cannot_be_trained_is_refused_with_its_place(checker, inline, message):
    with pytest.raises(InvalidArgumentError, match=message):
        checker.check(inline)


def test_all_unusable_records_are_told_by_task_record_and_field(checker):
    one = [*PAIRS, {"prompt": "x", "completion": " "}]
    two = [*PAIRS, {"prompt": "", "completion": "y"}, {"completion": "y"}]
    with pytest.raises(InvalidArgumentError) as caught:
        checker.check([InlineTask("a", one), InlineTask("b", two, valid=[PAIRS[0], {"prompt": 4}])])
    assert caught.value.message.splitlines() == [
        "4 unusable record(s) in the training data:",
        "tasks[0].records[12]: completion is empty",
        "tasks[1].records[12]: prompt is empty",
        "tasks[1].records[13]: prompt is missing; it has to be a text",
        "tasks[1].valid[1]: prompt is 4; it has to be a text",
    ]


def test_a_refusal_is_short_enough_for_a_header(checker):
    bad = [*PAIRS, *({"prompt": "x", "completion": 10**i} for i in range(60))]
    tasks = [InlineTask(f"a{i}", bad) for i in range(20)]
    with pytest.raises(InvalidArgumentError) as caught:
        checker.check(tasks)
    assert len(caught.value.message) < 2000


def test_what_is_too_large_is_refused(checker, make_checker, monkeypatch):
    pairs = [{"prompt": "twelve bytes", "completion": "yes"}] * 12  # 16 tokens with the end
    options = {"steps": 9, "batch_size": 12, "valid_share": 0, "prompt_format": "raw"}
    strict = make_checker(1000)
    with pytest.raises(ResourceExhaustedError, match="about 1728 tokens, the limit is 1000"):
        strict.check([InlineTask("a", pairs, options=options)])
    with pytest.raises(InvalidArgumentError, match="must be 1 to 64"):
        checker.check([InlineTask(f"a{i}", PAIRS) for i in range(65)])
    monkeypatch.setattr(check, "MAX_RECORDS", 20)
    with pytest.raises(ResourceExhaustedError, match="24 records, the limit is 20"):
        checker.check([InlineTask("a", PAIRS, valid=PAIRS)])
