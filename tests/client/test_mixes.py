import math

import pytest

from redmux import Mix, MixPart
from redmux.errors import InvalidArgumentError
from redmux.mixes import layers_text, parse_layers, parse_part, parse_parts


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("acme/tone", MixPart("acme/tone")),
        ("acme/tone:0.7", MixPart("acme/tone", 0.7)),
        ("a:-1e-1:0,4-7", MixPart("a", -0.1, [0, 4, 5, 6, 7])),
        (f"sha256:{'1' * 64}", MixPart(f"sha256:{'1' * 64}")),
        (f"sha256:{'1' * 64}:2", MixPart(f"sha256:{'1' * 64}", 2)),
        ("some/folder.d:1:3", MixPart("some/folder.d", 1, [3])),
    ],
)
def test_a_part_is_a_name_or_digest_with_weight_and_layers(text, part):
    assert parse_part(text) == part
    assert parse_part(str(part)) == part


def test_a_list_of_parts_keeps_the_commas_of_layers():
    text = "a:0.7:0,4-7,3b:0.3,7-seg:1,c"
    expected = [MixPart("a", 0.7, [0, 4, 5, 6, 7]), MixPart("3b", 0.3), MixPart("7-seg"),
                MixPart("c")]  # fmt: skip
    assert parse_parts(text) == expected


@pytest.mark.parametrize("text", ["", "x", "1-", "-1", "1,,2", "²", "9999999"])
def test_what_is_no_list_of_layers_is_refused(text):
    with pytest.raises(InvalidArgumentError, match="is no list of layers such as"):
        parse_layers(text)


def test_layers_are_written_in_runs():
    assert layers_text([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert parse_layers("0-2,5,7-8") == [0, 1, 2, 5, 7, 8]


@pytest.mark.parametrize("weight", [math.nan, math.inf, 101, -100.5, 10**400, "1", True, None])
def test_a_weight_is_a_number_of_at_most_a_hundred(weight):
    with pytest.raises(InvalidArgumentError, match=r"the weight of 'a' in the mix .* at most 100"):
        Mix({"a": weight})
    with pytest.raises(InvalidArgumentError, match="the strength of the mix is"):
        Mix({"a": 1}, strength=weight)


@pytest.mark.parametrize("layers", [[], [-1], [True], [0.5], "0-3", 3, range(2000)])
def test_layers_of_a_part_are_numbers_from_zero_on(layers):
    with pytest.raises(InvalidArgumentError, match="layers of 'a' in the mix are no list"):
        MixPart("a", 1, layers)


@pytest.mark.parametrize("parts", [{}, [], None, [MixPart("a")] * 9])
def test_a_mix_has_one_to_eight_parts(parts):
    with pytest.raises(InvalidArgumentError, match="must be 1 to 8 adapters with their weights"):
        Mix(parts)
    with pytest.raises(InvalidArgumentError, match="has the part 'a', must be a MixPart"):
        Mix(["a"])


def test_how_and_prompt_from_are_checked():
    with pytest.raises(InvalidArgumentError, match="how is 'add', must be one of interpolate"):
        Mix({"a": 1}, "add")
    with pytest.raises(InvalidArgumentError, match=r"prompt_from is 'c', must be .*: a, b"):
        Mix({"a": 1, "b": 1}, prompt_from="c")
    with pytest.raises(InvalidArgumentError, match="has the adapter ''"):
        Mix({"": 1})


def test_a_mix_is_told_in_one_line():
    mixture = Mix([MixPart("a", 0.7), MixPart("b"), MixPart("c", 1, [0, 1])], "compose", 0.5)
    assert str(mixture) == "compose(a:0.7,b,c:1:0-1)*0.5"
    assert str(Mix({"a": 1})) == "interpolate(a)"
