import hashlib
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redmux.errors import InvalidAdapterError, WrongBaseError
from redmux_adapters import Adapter, AdapterMetadata, Edit, PromptFormat, Turn, check_base

BASE = "llama-4x2-0123456789abcdef"
FORMAT = PromptFormat(Turn("<u>", "</u>"), Turn("<a>", "</a>"))
values = st.floats(-1e4, 1e4, width=32)


@st.composite
def edits(draw):
    dim = draw(st.integers(1, 5))
    vectors = st.lists(values, min_size=dim, max_size=dim).map(torch.tensor)
    return Edit(draw(vectors), draw(vectors))


part = st.text("abcXYZ019_", min_size=1, max_size=4)
sites = st.lists(part, min_size=1, max_size=4).map(".".join)
turns = st.builds(Turn, st.text(max_size=8), st.text(max_size=8))
formats = st.none() | st.builds(PromptFormat, turns, turns, st.none() | turns)
adapters = st.builds(
    Adapter, st.just(BASE), st.dictionaries(sites, edits(), min_size=1, max_size=4), formats
)


def sample(**changes):
    fields = {
        "base_fingerprint": BASE,
        "edits": {"b.x": Edit(torch.tensor([2.0]), torch.tensor([3.0])), "a": Edit.identity(2)},
        "prompt_format": FORMAT,
        **changes,
    }
    return Adapter(**fields)


def digest_by_the_document(adapter):
    """docs/format.md, section Digest, written down again."""
    form = "" if adapter.prompt_format is None else adapter.prompt_format.canonical().decode()
    content = b""
    for text in ("redmux-adapter-v1", adapter.base_fingerprint, form):
        content += struct.pack("<Q", len(text)) + text.encode()
    for site in sorted(adapter.edits):
        content += struct.pack("<Q", len(site)) + site.encode()
        for vector in (adapter.edits[site].scale, adapter.edits[site].bias):
            content += struct.pack(f"<Q{len(vector)}f", 4 * len(vector), *vector.tolist())
    return "sha256:" + hashlib.sha256(content).hexdigest()


@given(adapters)
@settings(deadline=None, database=None, max_examples=60)
def test_digest_is_what_the_document_says(adapter):
    assert adapter.digest == digest_by_the_document(adapter)


def test_digest_does_not_change_between_releases():
    assert sample().digest == (
        "sha256:b602896e28f3943c336b5ab1aca251f7ee1bd14b3ac2af111070dc6c8c653105"
    )


@given(adapters, st.data())
@settings(deadline=None, database=None, max_examples=100)
def test_digest_changes_with_any_single_value(adapter, data):
    site = data.draw(st.sampled_from(sorted(adapter.edits)))
    edit = adapter.edits[site]
    vectors = {"scale": edit.scale.clone(), "bias": edit.bias.clone()}
    vector = vectors[data.draw(st.sampled_from(["scale", "bias"]))]
    index = data.draw(st.integers(0, edit.dim - 1))
    # One step towards 0, which stays within bounds.
    vector[index] = torch.nextafter(vector[index], torch.tensor(0.0)) if vector[index] else 1.0
    changed = {**adapter.edits, site: Edit(**vectors)}
    assert Adapter(BASE, changed, adapter.prompt_format).digest != adapter.digest


@pytest.mark.parametrize(
    "changes",
    [
        {"base_fingerprint": BASE[:-1]},
        {"prompt_format": None},
        {"prompt_format": PromptFormat(Turn("<u>", "</u>"), Turn("<a", "></a>"))},
        {"prompt_format": PromptFormat(FORMAT.user, FORMAT.assistant, Turn("", ""))},
        {"edits": {"a": Edit.identity(2)}},
        {"edits": {"b": Edit(torch.tensor([2.0]), torch.tensor([3.0])), "a": Edit.identity(2)}},
        {"edits": {"b.x": Edit(torch.tensor([3.0]), torch.tensor([2.0])), "a": Edit.identity(2)}},
        {"edits": {"b.x": Edit(torch.tensor([2.0]), torch.tensor([3.0])), "a": Edit.identity(1)}},
    ],
)
def test_digest_changes_with_each_field(changes):
    assert sample(**changes).digest != sample().digest


def test_digest_ignores_metadata_but_equality_does_not():
    described = sample(metadata=AdapterMetadata(description="other"))
    assert described.digest == sample().digest
    assert described != sample()
    assert sample() == sample()
    assert hash(sample()) == hash(sample())


def test_adapter_is_immutable_and_owns_its_vectors():
    scale, bias = torch.ones(2), torch.zeros(2)
    given_edits = {"m": Edit(scale, bias)}
    adapter = Adapter(BASE, given_edits)
    scale[0] = 5
    given_edits["n"] = Edit.identity(2)
    assert adapter.edits["m"].scale.tolist() == [1, 1]
    assert list(adapter.edits) == ["m"]
    with pytest.raises(AttributeError):
        adapter.base_fingerprint = "x"
    with pytest.raises(TypeError):
        adapter.edits["m"] = Edit.identity(2)


def test_vectors_are_kept_as_contiguous_fp32():
    edit = Edit(torch.ones(8, dtype=torch.bfloat16)[::2], torch.zeros(4, requires_grad=True))
    assert edit.scale.dtype == edit.bias.dtype == torch.float32
    assert edit.scale.is_contiguous()
    assert not edit.bias.requires_grad


def test_sites_are_sorted_and_counted():
    adapter = sample()
    assert list(adapter.edits) == ["a", "b.x"]
    assert adapter.sites == {"a": 2, "b.x": 1}
    assert adapter.num_parameters == 6
    assert adapter.nbytes == 24
    assert repr(adapter).startswith("Adapter(sha256:")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (float("nan"), r"'m\.bias' has 1 non-finite value\(s\), the first \(nan\) at index 2"),
        (float("inf"), r"'m\.bias' has 1 non-finite value\(s\), the first \(inf\) at index 2"),
        (-10001.0, r"'m\.bias' has the value -10001 at index 2; the largest allowed .* 10000"),
    ],
)
def test_values_are_finite_and_bounded(bad, message):
    with pytest.raises(InvalidAdapterError, match=message):
        Adapter(BASE, {"m": Edit(torch.ones(4), torch.tensor([0, 1e4, bad, 0]))})


@pytest.mark.parametrize(
    ("scale", "bias", "message"),
    [
        (torch.ones(1, 4), torch.zeros(4), r"scale has shape \[1, 4\]"),
        (torch.ones(0), torch.zeros(0), r"scale has shape \[0\]"),
        (torch.ones(4), torch.zeros(4, dtype=torch.int32), "bias .* torch.int32"),
        (torch.ones(4), torch.zeros(3), "scale has 4 values and bias 3"),
    ],
)
def test_edit_takes_two_vectors_of_one_length(scale, bias, message):
    with pytest.raises(InvalidAdapterError, match=message):
        Edit(scale, bias)


@pytest.mark.parametrize("site", ["", ".", "a.", "a..b", "a/b", "../x", "a b", "\u0430", "x" * 257])
def test_sites_are_module_paths(site):
    with pytest.raises(InvalidAdapterError, match="module path"):
        Adapter(BASE, {site: Edit.identity(2)})


@pytest.mark.parametrize("base", ["", "a b", "../x", "x" * 161, "\u0430", None])
def test_base_fingerprint_is_a_short_name(base):
    with pytest.raises(InvalidAdapterError, match="base_fingerprint"):
        Adapter(base, {"m": Edit.identity(2)})


def test_adapter_without_edits_is_refused():
    with pytest.raises(InvalidAdapterError, match="at least one module"):
        Adapter(BASE, {})


def test_identity_of_sites_changes_nothing():
    adapter = Adapter.identity({"m": 3}, BASE, prompt_format=FORMAT)
    assert adapter.edits["m"].scale.tolist() == [1, 1, 1]
    assert adapter.edits["m"].bias.tolist() == [0, 0, 0]
    assert adapter.prompt_format == FORMAT


def test_identity_of_sites_needs_a_fingerprint():
    with pytest.raises(InvalidAdapterError, match="base_fingerprint"):
        Adapter.identity({"m": 3})


def test_wrong_base_error_names_both():
    check_base(sample(), BASE)
    with pytest.raises(WrongBaseError, match=f"made for base '{BASE}', this base is 'gpt2-1x1-0'"):
        check_base(sample(), "gpt2-1x1-0")
