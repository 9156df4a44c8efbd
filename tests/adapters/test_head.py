import json

import pytest
import torch
from safetensors.torch import load, save

from redmux.errors import InvalidAdapterError
from redmux_adapters import (
    Adapter,
    Edit,
    Head,
    HeadConfig,
    parse_adapter,
    read_adapter,
    summarize,
    to_bytes,
    write_folder,
)
from redmux_adapters.format.head import KINDS

BASE = "roberta-4x2-0"
EDITS = {"encoder.layer.0.output.dense": Edit(torch.rand(4), torch.rand(4))}
SINGLE = "single_label_classification"


def config(kind="roberta", labels=("no", "yes", "may\u00eb"), problem_type=SINGLE):
    return HeadConfig(kind, labels, problem_type)


def tensors(kind="roberta", hidden=4, labels=3):
    sizes = {"h": hidden, "l": labels}
    return {
        name: torch.randn([sizes[letter] for letter in letters])
        for name, letters in KINDS[kind].items()
    }


def adapter(kind="roberta", **changes):
    return Adapter(BASE, EDITS, head=Head(config(kind), tensors(kind)), **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_head_survives_both_forms(kind, tmp_path):
    original = adapter(kind)
    write_folder(original, tmp_path)
    for read in (read_adapter(tmp_path), parse_adapter(to_bytes(original))):
        assert read == original
        assert read.head.config == config(kind)
        assert list(read.head.tensors) == sorted(original.head.tensors)
        for name, tensor in original.head.tensors.items():
            assert torch.equal(read.head.tensors[name], tensor)
        assert to_bytes(read) == to_bytes(original)


def test_safetensors_reads_the_head_under_its_documented_names():
    original = adapter()
    read = load(to_bytes(original))
    for name, tensor in original.head.tensors.items():
        assert torch.equal(read[f"head.{name}"], tensor)


def test_files_of_other_writers_in_mixed_precision_are_read():
    original, text = adapter(), {"peft_type": "RED", "base_fingerprint": BASE}
    given = {"encoder.layer.0.output.dense.bias": torch.ones(4)}
    given |= {f"head.{name}": t.bfloat16() for name, t in original.head.tensors.items()}
    read = parse_adapter(save(given), json.dumps(text | {"head": config().to_json()}))
    for name, tensor in original.head.tensors.items():
        assert torch.equal(read.head.tensors[name], tensor.bfloat16().float())


def test_digest_covers_tensors_labels_and_problem_type():
    plain, one = Adapter(BASE, EDITS), tensors()
    other = one | {"out_proj.bias": one["out_proj.bias"] + 1}
    heads = [
        Head(config(), one),
        Head(config(), other),
        Head(config(labels=("yes", "no", "x")), one),
        Head(config(problem_type="multi_label_classification"), one),
    ]
    digests = {Adapter(BASE, EDITS, head=head).digest for head in heads}
    assert len(digests | {plain.digest}) == 5


def test_summary_counts_the_head_apart():
    original = adapter()
    summary = summarize(to_bytes(original))
    assert summary.digest == original.digest
    assert summary.config.head == config()
    assert summary.num_parameters == original.num_parameters == 8
    assert summary.num_head_parameters == original.head.num_parameters == 4 * 4 + 4 + 3 * 4 + 3
    assert summary.nbytes == original.nbytes == 4 * (8 + 35)
    assert original.head.hidden_size == 4


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"kind": "gpt"}, "head kind is 'gpt'; known are roberta, electra, distilbert, bert"),
        ({"problem_type": "x"}, "problem_type is 'x'; it has to be one of single_label"),
        ({"labels": ()}, r"labels are \(\); they have to be a list of 1 to 1024"),
        ({"labels": "yes"}, "labels are 'yes'; they have to be a list"),
        ({"labels": ("a", "")}, "a label is empty"),
        ({"labels": ("a", 1)}, "a label is 1; it has to be a string"),
        ({"labels": ("a", "a")}, "each may occur once"),
        ({"labels": ("a" * 129, "b")}, "a label has 129 characters; limit 128"),
        ({"labels": ("a",)}, "one output chooses between no labels"),
    ],
)
def test_impossible_configurations_are_refused(changes, error):
    with pytest.raises(InvalidAdapterError, match=error):
        config(**changes)


@pytest.mark.parametrize("value", [None, "roberta", {}, {"kind": "roberta"}, {"a": 1}])
def test_configurations_of_another_form_are_refused(value):
    with pytest.raises(InvalidAdapterError, match="object of kind, labels, problem_type"):
        HeadConfig.from_json(value)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"dense.bias": torch.ones(3)}, r"head.dense.bias has shape \[3\]; .* has to be \[4\]"),
        ({"out_proj.weight": torch.ones(2, 4)}, r"shape \[2, 4\]; for 3 labels .* be \[3, 4\]"),
        ({"out_proj.weight": torch.ones(())}, "hidden size 0"),
        ({"dense.weight": torch.ones(4)}, r"dense.weight has shape \[4\]"),
        ({"other.weight": torch.ones(4)}, "has the tensors dense.weight, .* found '.*other.weight"),
        ({"dense.bias": torch.tensor([0, 0, float("nan"), 0])}, "'head.dense.bias' has 1 non-fin"),
        ({"dense.bias": torch.full((4,), 2e4)}, "'head.dense.bias' has the value 20000"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(changes, error):
    with pytest.raises(InvalidAdapterError, match=error):
        Adapter(BASE, EDITS, head=Head(config(), tensors() | changes))
    given = {"a.bias": torch.ones(4)}
    given |= {f"head.{name}": t for name, t in (tensors() | changes).items() if t.dim()}
    text = {"peft_type": "RED", "base_fingerprint": BASE, "head": config().to_json()}
    for read in (parse_adapter, summarize):
        with pytest.raises(InvalidAdapterError, match=error if "ize 0" not in error else "found"):
            read(save(given), json.dumps(text))


def test_tensors_and_configuration_come_together():
    with_head, without = adapter(), Adapter(BASE, EDITS)
    text = {"peft_type": "RED", "base_fingerprint": BASE}
    for read in (parse_adapter, summarize):
        with pytest.raises(InvalidAdapterError, match="4 tensors of a head, but adapter_config"):
            read(save(load(to_bytes(with_head))), json.dumps(text))
        with pytest.raises(InvalidAdapterError, match="found 'none'"):
            read(save(load(to_bytes(without))), json.dumps(text | {"head": config().to_json()}))


def test_module_paths_of_heads_are_reserved():
    with pytest.raises(InvalidAdapterError, match=r"'head\.x' starts with 'head\.'"):
        Adapter(BASE, {"head.x": Edit.identity(4)})
