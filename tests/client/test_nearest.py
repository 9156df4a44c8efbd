"""Suggestions for mistyped words: which come, and what they cost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redmux._nearest import nearest

KNOWN = ["steps", "max_steps", "batch_size", "learning_rate", "acme/summarize", "seed"]


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("step", "steps"),
        ("batchsize", "batch_size"),
        ("learning-rate", "learning_rate"),
        ("lerning_rate", "learning_rate"),
        ("acme/sumarize", "acme/summarize"),
        ("acme/summary", "acme/summarize"),
        ("sed", "seed"),
    ],
)
def test_the_word_that_was_meant_comes_first(word, meant):
    assert nearest(word, KNOWN) == [meant]


@pytest.mark.parametrize("word", ["", "zzz", "rate of nothing at all", "x" * 201])
def test_a_word_that_is_like_none_has_no_suggestion(word):
    assert nearest(word, KNOWN) == []


def test_several_come_in_the_order_of_their_likeness():
    assert nearest("steps_", ["step", "steps", "seps", "zzz"], 2) == ["steps", "step"]


def test_there_may_be_no_words_to_suggest():
    assert nearest("x", []) == []


@given(st.text(), st.lists(st.text()), st.integers(1, 4))
def test_suggestions_are_known_words_and_no_more_than_asked_for(word, known, num):
    found = nearest(word, known, num)
    assert len(found) <= num
    assert set(found) <= set(known)


@given(st.text(min_size=1, max_size=200))
def test_a_known_word_is_nearest_to_itself(word):
    assert nearest(word, [word, word + "x"][: 1 if len(word) == 200 else 2])[0] == word
