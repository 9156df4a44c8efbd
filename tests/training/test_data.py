"""Data: what is read, and that everything unusable is told with its file and line."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from redmux.errors import InvalidArgumentError
from redmux.training_data import Faults
from redmux_adapters import PromptFormat, Turn
from redmux_adapters.train.examples import Example, ExampleReader, form_of, labels_of
from redmux_adapters.train.prompts import PromptWriter
from redmux_adapters.train.records import read_records
from redmux_server.models.text import TextCodec

CHAT = [{"role": "user", "content": "Hi"}]
TURNS = PromptFormat(user=Turn("<u>", ""), assistant=Turn("<a>", "<eos>"))


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


def read(path, tokenizer, kind="causal", max_length=64, labels=(), columns=None):
    """The examples of a file and its faults as "place: message"."""
    faults = Faults()
    records = read_records(str(path), columns or {}, faults)
    form = form_of(records)
    reader = ExampleReader(
        kind, form, PromptWriter(tokenizer, "raw"), max_length, labels or labels_of(records)
    )
    examples = reader.read(records, faults)
    return examples, [f"{where}: {message}" for where, message in faults.found]


def test_every_unusable_line_is_told_by_file_and_line(tokenizer, tmp_path):
    path = tmp_path / "d.jsonl"
    lines = [
        json.dumps({"prompt": "one", "completion": "1"}),
        "{broken",
        "",
        '["a list"]',
        json.dumps({"prompt": "", "completion": "2"}),
        json.dumps({"prompt": "three"}),
        json.dumps({"prompt": "four", "completion": 4}),
        json.dumps({"prompt": "x" * 90, "completion": "5"}),
        json.dumps({"prompt": "six", "completion": "6"}),
    ]
    odd = b'\n{"prompt": "\xff", "completion": ""}\n{"prompt": "\\ud83d", "completion": ""}\n'
    path.write_bytes("\n".join(lines).encode() + odd)
    examples, faults = read(path, tokenizer)
    assert len(examples) == 2
    expected = [
        "d.jsonl:2: not valid JSON",
        "d.jsonl:4: not a JSON object",
        "d.jsonl:10: not UTF-8 at byte 12; convert the file",
        "d.jsonl:11: holds half of a character, \\ud83d; write it as UTF-8",
        "d.jsonl:5: prompt is empty",
        "d.jsonl:6: completion is missing",
        "d.jsonl:7: completion is 4; it has to be a text",
        "d.jsonl:8: too long: 92 tokens; limit max_length=64",
    ]
    assert len(faults) == len(expected)
    for fault, start in zip(faults, expected, strict=True):
        assert fault.startswith(start)


def test_all_faults_are_told_at_once_with_their_number():
    faults = Faults()
    faults.raise_any()
    for line in range(30, 0, -1):
        faults.add(f"d.jsonl:{line}", "empty")
    with pytest.raises(InvalidArgumentError) as error:
        faults.raise_any()
    assert error.value.message.startswith("30 unusable record(s)")
    assert "d.jsonl:20: empty\nand 10 more" in error.value.message


def test_csv_lines_are_counted_as_an_editor_does(tokenizer, tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('question,answer\n"two\nlines",a\nonly one\nfour,\nfive,e\n')
    columns = {"prompt": "question", "completion": "answer"}
    examples, faults = read(path, tokenizer, columns=columns)
    assert len(examples) == 2
    assert faults == [
        "d.csv:4: 1 columns, the header has 2", "d.csv:5: completion is empty",
    ]  # fmt: skip


def test_labels_are_numbered_in_order_and_unknown_ones_are_told(tokenizer, tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("text,label\nu,10\nv,9\nw,10\nx,\ny,11\n")
    examples, faults = read(path, tokenizer, "classifier", labels=("9", "10"))
    assert [e.label for e in examples] == [1, 0, 1]
    assert faults == [
        "d.csv:5: label is missing or empty", "d.csv:6: unknown label '11'; known are 9, 10",
    ]  # fmt: skip
    assert labels_of(read_records(str(path), {}, Faults())[:3]) == ("9", "10")


@pytest.mark.parametrize("score", ["x", None, True, float("nan"), ""])
def test_scores_have_to_be_finite_numbers(tokenizer, tmp_path, score):
    path = tmp_path / "d.jsonl"
    lines = [{"text": "a", "score": "2.5"}, {"text": "b", "score": score}]
    path.write_text("\n".join(map(json.dumps, lines)))
    examples, faults = read(path, tokenizer, "classifier")
    assert [e.label for e in examples] == [2.5]
    assert "has to be a finite number" in faults[0]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("text", "has to be a list of objects"),
        (CHAT, "last, the assistant's message"),
        ([{"role": "assistant", "content": "A"}], "a user's"),
        ([*CHAT, {"role": "assistant", "content": ""}], "content is empty"),
        ([{"role": "judge", "content": "?"}, {"role": "assistant", "content": "A"}], "judge"),
    ],
)
def test_conversations_have_to_end_with_the_answer(tokenizer, tmp_path, messages, message):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    examples, (fault,) = read(path, tokenizer)
    assert not examples
    assert message in fault


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing.jsonl", "cannot read"),
        ("data.parquet", "cannot tell the format"),
        ("datasets:squad", "pip install datasets"),
        ("array.json", "array.json is one JSON array"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("array.json").write_text(json.dumps([{"prompt": "a", "completion": "b"}], indent=1))
    with pytest.raises(InvalidArgumentError, match=message):
        read_records(source, {}, Faults())


def test_unknown_forms_and_columns_are_refused_with_those_there_are(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"question": "a", "answer": "b"}')
    with pytest.raises(InvalidArgumentError, match=r"d.jsonl:1 has the fields question, answer"):
        form_of(read_records(str(path), {}, Faults()))
    with pytest.raises(InvalidArgumentError, match="no column 'reply' for completion"):
        read_records(str(path), {"completion": "reply"}, Faults())


@pytest.mark.parametrize("style", ["template", "chatml", "raw", TURNS])
def test_prompts_are_those_that_the_server_makes(tokenizer, style):
    writer, codec = PromptWriter(tokenizer, style), TextCodec(tokenizer, None)
    inputs, targets = writer.completion("Hi", "Yes")
    if style == "raw":
        assert list(inputs) == codec.encode("Hi").ids
    assert list(inputs) == codec.encode_chat(CHAT, writer.prompt_format).ids
    assert codec.decode(targets) == "Yes"
    assert targets[-1] in codec.eos_token_ids
    assert not codec.eos_token_ids & set(targets[:-1])


def test_the_last_answer_of_a_conversation_is_learned(tokenizer):
    writer = PromptWriter(tokenizer, "auto")
    before = [*CHAT, {"role": "assistant", "content": "A"}, {"role": "user", "content": "B"}]
    inputs, targets = writer.chat(before, "C")
    assert tokenizer.decode(inputs) == "[user]Hi[assistant]A[user]B[assistant]"
    assert tokenizer.decode(targets) == "C<eos>"
    assert writer.prompt_format is None


def test_special_tokens_of_raw_prompts_are_the_tokenizers(tokenizer):
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    own = deepcopy(tokenizer)
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", 0)]
    )
    inputs, _ = PromptWriter(own, "raw").completion("ab", "c")
    assert inputs[0] == 0
    assert len(inputs) == 3  # the end token of the tokenizer would end the prompt


def test_an_encoder_decoder_reads_two_texts_as_its_tokenizer_joins_them(tokenizer, tmp_path):
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    own = deepcopy(tokenizer)
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", pair="$A <eos> $B <eos>", special_tokens=[("<eos>", 0)]
    )
    path = tmp_path / "d.jsonl"
    record = {"prompt": "ab", "prompt_pair": "cd", "completion": "e"}
    path.write_text(json.dumps(record) + "\n" + json.dumps({**record, "prompt_pair": 3}))
    (example,), faults = read(path, own, kind="seq2seq")
    # What a server makes of the two with the end token between them.
    assert example.inputs == tuple(own("ab<eos>cd")["input_ids"])
    assert own.decode(example.inputs) == "ab<eos>cd<eos>"
    assert own.decode(example.targets) == "e<eos>"
    assert faults == ["d.jsonl:2: prompt_pair is 3; it has to be a text"]
    examples, faults = read(path, own)
    assert not examples
    assert "d.jsonl:1: prompt_pair is for encoder-decoder models" in faults[0]


def test_an_example_is_as_long_as_what_is_computed_for_it():
    assert Example((1, 2), (3,)).length == 3
