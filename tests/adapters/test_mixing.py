"""The algebra of mixes, against the edits applied to hidden states one by one."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redmux import Mix, MixPart
from redmux.errors import InvalidAdapterError, WrongBaseError
from redmux_adapters import (
    Adapter,
    AdapterMetadata,
    Edit,
    Head,
    HeadConfig,
    PromptFormat,
    Turn,
    mix,
    recipe_digest,
    recipe_of,
)

BASE = "llama-4x3-0"
SITE = "model.layers.{}.mlp.down_proj"
FORMAT = PromptFormat(Turn("<u>", ""), Turn("<a>", ""))

quick = settings(deadline=None, database=None, max_examples=60)
values = st.floats(-10, 10, width=32)
vectors = st.lists(values, min_size=4, max_size=4)
edits = st.builds(lambda s, b: Edit(torch.tensor(s), torch.tensor(b)), vectors, vectors)
adapters = st.dictionaries(st.sampled_from([SITE.format(n) for n in range(3)]), edits, min_size=1)
adapters = adapters.map(lambda edits: Adapter(BASE, edits))
weights = st.floats(-3, 3)


def random_adapter(seed, layers=range(3), **more):
    generator = torch.Generator().manual_seed(seed)
    edits = {
        SITE.format(n): Edit(
            1 + torch.randn(4, generator=generator) / 4, torch.randn(4, generator=generator)
        )
        for n in layers
    }
    return Adapter(BASE, edits, **more)


def edited(adapter, site, h):
    """What an edit makes of h, in fp64."""
    edit = adapter.edits.get(site)
    if edit is None:
        return h
    return h * edit.scale.numpy().astype(np.float64) + edit.bias.numpy().astype(np.float64)


def assert_edits(mixed, reference, terms):
    """Holds the edits of a mix against h -> reference(site, h), a map that is affine in h.

    `terms(site)` bounds what is added up, of which a rounding to fp32 may be a part.
    """
    for site, edit in mixed.edits.items():
        zero, one = np.zeros(4), np.ones(4)
        bias = reference(site, zero)
        scale = reference(site, one) - bias
        for found, wanted in ((edit.scale, scale), (edit.bias, bias)):
            slack = 2**-24 * np.abs(wanted) + 2**-50 * terms(site) + 1e-44
            assert (np.abs(found.numpy().astype(np.float64) - wanted) <= slack).all(), site


def bound(*parts):
    def terms(site):
        total = 1.0
        for part in parts:
            edit = part.edits.get(site)
            if edit is not None:
                largest = max(float(edit.scale.abs().max()), float(edit.bias.abs().max()))
                total *= 2 + 4 * largest
        return total * 10

    return terms


def same_edits(first, second):
    return first.sites == second.sites and all(
        torch.equal(edit.scale, second.edits[site].scale)
        and torch.equal(edit.bias, second.edits[site].bias)
        for site, edit in first.edits.items()
    )


@quick
@given(adapters, adapters, weights, weights)
def test_interpolation_adds_up_what_two_edits_change(first, second, a, b):
    mixed = mix(Mix({"a": a, "b": b}), [first, second])

    def reference(site, h):
        return h + a * (edited(first, site, h) - h) + b * (edited(second, site, h) - h)

    assert mixed.edits.keys() == first.edits.keys() | second.edits.keys()
    assert_edits(mixed, reference, bound(first, second))


@quick
@given(adapters, adapters)
def test_composition_applies_one_edit_after_the_other(first, second):
    mixed = mix(Mix({"a": 1, "b": 1}, "compose"), [first, second])

    def reference(site, h):
        return edited(second, site, edited(first, site, h))

    assert_edits(mixed, reference, bound(first, second))


@quick
@given(adapters, adapters, adapters)
def test_composition_is_associative_but_for_the_rounding_between(first, second, third):
    pair, triple = Mix({"a": 1, "b": 1}, "compose"), Mix({"a": 1, "b": 1, "c": 1}, "compose")
    whole = mix(triple, [first, second, third])
    for nested in (
        mix(pair, [mix(pair, [first, second]), third]),
        mix(pair, [first, mix(pair, [second, third])]),
    ):
        for site, edit in whole.edits.items():
            slack = 2**-21 * bound(first, second, third)(site)
            for name in ("scale", "bias"):
                difference = getattr(edit, name) - getattr(nested.edits[site], name)
                assert float(difference.abs().max()) <= slack


@quick
@given(adapters, st.sampled_from(["interpolate", "compose"]))
def test_an_adapter_alone_with_weight_one_is_itself(adapter, how):
    assert same_edits(mix(Mix({"a": 1}, how), [adapter]), adapter)


@quick
@given(adapters, adapters, st.sampled_from(["interpolate", "compose"]))
def test_a_part_of_weight_zero_changes_nothing(first, second, how):
    mixed = mix(Mix({"a": 1, "b": 0}, how), [first, second])
    for site, edit in mixed.edits.items():
        wanted = first.edits.get(site, Edit.identity(4))
        assert torch.equal(edit.scale, wanted.scale)
        assert torch.equal(edit.bias, wanted.bias)


@quick
@given(adapters, adapters, weights, weights, st.sampled_from(["interpolate", "compose"]))
def test_strength_zero_is_the_identity_bit_by_bit(first, second, a, b, how):
    mixed = mix(Mix({"a": a, "b": b}, how, strength=0), [first, second])
    for edit in mixed.edits.values():
        assert edit.scale.numpy().tobytes() == np.ones(4, np.float32).tobytes()
        assert edit.bias.numpy().tobytes() == np.zeros(4, np.float32).tobytes()


@quick
@given(adapters, adapters, weights, weights)
def test_the_order_of_an_interpolation_changes_no_bit_nor_the_digest(first, second, a, b):
    mixed = mix(Mix({"a": a, "b": b}), [first, second])
    other = mix(Mix({"b": b, "a": a}), [second, first])
    assert mixed.digest == other.digest
    digests = [first.digest, second.digest]
    assert recipe_digest(Mix({"a": a, "b": b}), digests) == recipe_digest(
        Mix({"x": b, "y": a}), digests[::-1]
    )


def test_strength_is_the_weight_of_the_whole():
    first, second = random_adapter(1), random_adapter(2)
    whole = mix(Mix({"a": 1, "b": 0.5}, "compose"), [first, second])
    halved = mix(Mix({"a": 1, "b": 0.5}, "compose", strength=0.5), [first, second])
    for site, edit in whole.edits.items():
        torch.testing.assert_close(halved.edits[site].scale, 0.5 + edit.scale / 2)
        torch.testing.assert_close(halved.edits[site].bias, edit.bias / 2)


def test_what_is_mixed_is_rounded_once():
    scale = torch.full((4,), 1.1)
    adapter = Adapter(BASE, {SITE.format(0): Edit(scale, torch.zeros(4))})
    mixed = mix(Mix([MixPart("a")] * 8, "compose"), [adapter] * 8)
    exact = np.float32(float(scale[0]) ** 8)
    in_steps = np.float32(1)
    for _ in range(8):
        in_steps *= np.float32(1.1)
    assert float(mixed.edits[SITE.format(0)].scale[0]) == exact != in_steps


def test_layers_are_where_a_part_acts_and_others_are_left_alone():
    first, second = random_adapter(1), random_adapter(2)
    mixed = mix(Mix([MixPart("a", 1, [0, 1]), MixPart("b", 1, [2])]), [first, second])
    for number, wanted in ((0, first), (1, first), (2, second)):
        site = SITE.format(number)
        assert torch.equal(mixed.edits[site].scale, wanted.edits[site].scale)
    alone = mix(Mix([MixPart("a", 1, [1])]), [first])
    assert list(alone.edits) == [SITE.format(1)]


def test_one_adapter_may_have_several_weights_by_layer():
    adapter = random_adapter(1)
    mixed = mix(Mix([MixPart("a", 1, [0]), MixPart("a", 0.5, [1, 2])]), [adapter] * 2)
    site = SITE.format(2)
    torch.testing.assert_close(mixed.edits[site].bias, adapter.edits[site].bias / 2)
    assert torch.equal(mixed.edits[SITE.format(0)].bias, adapter.edits[SITE.format(0)].bias)


def test_layers_without_edits_are_refused_with_those_that_there_are():
    with pytest.raises(InvalidAdapterError, match=r"'a' edits nothing in the layers 7-9 .*0-2"):
        mix(Mix([MixPart("a", 1, range(7, 10))]), [random_adapter(1)])


def test_parts_for_different_bases_are_refused_by_name():
    other = dataclasses.replace(random_adapter(2), base_fingerprint="gpt2-4x3-0")
    with pytest.raises(WrongBaseError, match=r"'(a|b)' was made for base .* and '(a|b)'"):
        mix(Mix({"a": 1, "b": 1}), [random_adapter(1), other])


def test_parts_of_other_sizes_are_refused_by_name():
    other = Adapter(BASE, {SITE.format(1): Edit.identity(5)})
    with pytest.raises(InvalidAdapterError, match=r"layers.1.mlp.down_proj' have 4 values in 'a'"):
        mix(Mix({"a": 1, "b": 1}, "compose"), [random_adapter(1), other])


def test_a_layer_norm_behind_an_edit_cannot_be_mixed():
    norm = {f"{SITE.format(0)}.activation_ln": Edit.identity(4), SITE.format(1): Edit.identity(4)}
    adapter = Adapter(BASE, norm)
    with pytest.raises(InvalidAdapterError, match="'b' has a LayerNorm behind an edit"):
        mix(Mix({"a": 1, "b": 1}), [random_adapter(1), adapter])
    mix(Mix([MixPart("b", 1, [1])]), [adapter])  # the norm is not in these layers


def test_values_that_become_too_large_are_refused():
    big = Adapter(BASE, {SITE.format(0): Edit(torch.full((4,), 9000.0), torch.zeros(4))})
    with pytest.raises(InvalidAdapterError, match="the largest allowed magnitude is 10000"):
        mix(Mix({"a": 2}), [big])
    with pytest.raises(InvalidAdapterError, match=r"non-finite|largest allowed"):
        mix(Mix([MixPart("a", 100)] * 8, "compose"), [big] * 8)


def test_equal_prompt_formats_are_kept_and_different_ones_need_a_choice():
    other = PromptFormat(Turn("Q: ", ""), Turn("A: ", ""))
    parts = [random_adapter(1, prompt_format=FORMAT), random_adapter(2, prompt_format=FORMAT)]
    assert mix(Mix({"a": 1, "b": 1}), parts).prompt_format == FORMAT
    parts[1] = random_adapter(2, prompt_format=other)
    with pytest.raises(InvalidAdapterError, match=r"'a' and 'b' .* different prompt formats"):
        mix(Mix({"a": 1, "b": 1}), parts)
    assert mix(Mix({"a": 1, "b": 1}, prompt_from="b"), parts).prompt_format == other
    parts[1] = random_adapter(2)
    assert mix(Mix({"a": 1, "b": 1}, prompt_from="b"), parts).prompt_format is None


def head(fill):
    tensors = {"classifier.weight": torch.full((2, 4), fill), "classifier.bias": torch.zeros(2)}
    return Head(HeadConfig("mean", ["x", "y"], "single_label_classification"), tensors)


def test_a_head_comes_from_the_one_part_that_has_it():
    parts = [random_adapter(1), random_adapter(2, head=head(1.0))]
    assert mix(Mix({"a": 1, "b": 1}), parts).head is parts[1].head
    parts[0] = random_adapter(1, head=head(1.0))
    assert mix(Mix({"a": 1, "b": 1}), parts).head is not None
    parts[0] = random_adapter(1, head=head(2.0))
    with pytest.raises(InvalidAdapterError, match=r"'a' and 'b' bring different .* heads"):
        mix(Mix({"a": 1, "b": 1}), parts)


def test_the_recipe_tells_digests_weights_and_layers():
    first, second = random_adapter(1), random_adapter(2)
    mixture = Mix([MixPart("b", 0.5, [0, 1, 2, 5]), MixPart("a", 2)], "compose", 0.5, "a")
    recipe = json.loads(recipe_of(mixture, [second.digest, first.digest]))
    assert recipe == {
        "how": "compose",
        "strength": 0.5,
        "parts": [
            {"digest": second.digest, "weight": 0.5, "layers": "0-2,5"},
            {"digest": first.digest, "weight": 2.0},
        ],
        "prompt_from": first.digest,
    }


def test_metadata_tells_the_recipe_and_what_the_parts_share():
    metadata = AdapterMetadata(license="MIT", description="x")
    parts = [random_adapter(n, metadata=metadata) for n in (1, 2)]
    mixture = Mix({"a": 0.7, "b": 0.3})
    mixed = mix(mixture, parts)
    assert mixed.metadata.license == "MIT"
    assert mixed.metadata.description == ""
    assert mixed.metadata.training == recipe_of(mixture, [part.digest for part in parts])
    parts[1] = random_adapter(2, metadata=AdapterMetadata(license="Apache-2.0"))
    assert mix(mixture, parts).metadata.license == ""
