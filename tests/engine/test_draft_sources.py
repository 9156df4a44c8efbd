"""Where drafts come from, and what they are told about costs."""

import pytest

from redmux_server.engine.answers import START, Answers
from redmux_server.engine.prompt_lookup import PromptLookup
from redmux_server.engine.step_cost import StepCost


def teach(answers, token_ids):
    context = START
    for token_id in token_ids:
        answers.add(context, token_id)
        context = (*context[1:], token_id)
    return context


def test_an_answer_that_came_before_is_guessed_from_its_start():
    answers = Answers(1000)
    teach(answers, [5, 0, 7])
    assert answers.guess(START).token_id == 5
    assert answers.guess((*START[1:], 5)).token_id == 0
    assert answers.guess((*START[2:], 5, 0)).token_id == 7


def test_what_came_true_again_is_likelier():
    answers = Answers(1000)
    chances = []
    for _ in range(4):
        teach(answers, [5, 6])
        chances.append(answers.guess(START).chance)
    assert chances == sorted(set(chances))


def test_what_others_contradict_gives_way_and_a_single_slip_does_not():
    answers = Answers(1000)
    for _ in range(4):
        teach(answers, [5])
    teach(answers, [8])
    assert answers.guess(START).token_id == 5
    for _ in range(4):
        teach(answers, [8])
    assert answers.guess(START).token_id == 8


def test_guesses_of_a_kind_are_as_likely_as_they_came_true():
    answers = Answers(1000)
    teach(answers, [5])
    for _ in range(600):
        for tries in answers.guess(START).tries:
            tries.add(is_right=False)
    assert answers.guess(START).chance < 0.1


def test_answers_keep_the_newest_contexts_and_no_more_than_they_may():
    answers = Answers(60)
    for first in range(0, 1000, 10):
        teach(answers, range(first, first + 10))
        assert len(answers) <= 60 + 3
    assert answers.guess((*START[1:], 995)).token_id == 996
    assert answers.guess((-2, -2, -2, -2, -2, 5)) is None


def test_an_unknown_context_has_no_guess():
    assert Answers(10).guess(START) is None


def test_a_text_is_looked_up_by_its_newest_tokens_the_longest_match_first():
    lookup = PromptLookup([1, 2, 3, 9, 2, 4])
    assert lookup.find([7, 1, 2]) == (2, 2)
    assert lookup.at(2) == 3
    assert lookup.find([7, 2]) == (5, 1)
    assert lookup.find([7, 4]) is None  # nothing stands behind the newest one
    lookup.add(1)
    assert lookup.find([2, 4]) == (6, 2)
    assert lookup.at(7) is None


def test_a_lookup_of_one_token_and_of_an_unknown_one_is_empty():
    lookup = PromptLookup([3])
    assert lookup.find([3]) is None
    lookup.add(3)
    assert lookup.find([3]) == (1, 1)
    assert lookup.find([4]) is None


def test_the_cost_of_steps_follows_those_that_were_seen():
    cost = StepCost()
    for _ in range(50):
        for rows in (1, 8, 32):
            cost.learn(rows, 0.010 + 0.002 * rows)
    for rows in (1, 8, 32):
        assert cost.of(rows) == pytest.approx(0.010 + 0.002 * rows, rel=0.05)
    assert cost.of(8) < cost.of(12) < cost.of(32)


def test_a_step_that_was_held_up_says_little_of_what_steps_cost():
    cost = StepCost()
    for _ in range(50):
        cost.learn(4, 0.01)
    cost.learn(4, 10.0)
    assert cost.of(4) < 0.012


def test_what_was_dear_once_is_tried_again_in_time():
    cost = StepCost()
    for _ in range(20):
        cost.learn(1, 0.01)
        cost.learn(8, 1.0)
    assert cost.of(8) > 0.5
    for _ in range(2000):
        cost.learn(1, 0.01)
    assert cost.of(8) < 0.02


def test_before_any_step_a_row_costs_a_little():
    cost = StepCost()
    assert cost.of(1) < cost.of(2) < cost.of(64) < 64 * cost.of(1)
