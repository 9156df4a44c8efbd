"""Which positions an adapter edits, and what that does to its digest and its file."""

import pytest

from redmux.errors import InvalidAdapterError, InvalidArgumentError
from redmux_adapters import Adapter, Edit, parse_adapter, summarize, to_bytes
from redmux_adapters.fold import fold
from redmux_adapters.format.window import edited_positions

PROMPT = [5, 1, 2, 3, 1, 2, 4]


def positions(apply, marker=()):
    """Which of the prompt's positions and the three behind it are edited."""
    edited = edited_positions(apply, PROMPT, marker)
    return [place for place in range(len(PROMPT) + 3) if place in edited]


def test_what_is_generated_depends_on_the_prompts_last_token_so_that_is_edited_with_it():
    assert positions("all") == [*range(10)]
    assert positions("prompt") == [*range(7)]
    assert positions("generation") == [6, 7, 8, 9]
    assert positions("after:x", [1, 2]) == [*range(2, 10)]  # the first of two
    assert positions("after:x", [4]) == positions("generation")


@pytest.mark.parametrize("marker", [[], [2, 1], [4, 9], [9]])
def test_a_marker_that_the_prompt_does_not_hold_is_told(marker):
    with pytest.raises(InvalidArgumentError, match="does not hold the tokens of 'x'"):
        edited_positions("after:x", PROMPT, marker)


def adapter(**options):
    return Adapter("tiny-2x1-0", {"a": Edit.identity(2)}, **options)


def test_the_window_is_part_of_the_digest_and_of_the_file():
    windows = ("all", "prompt", "generation", "after:a", "after:b")
    kinds = [adapter(apply=apply) for apply in windows]
    assert len({one.digest for one in kinds}) == len(kinds)
    assert kinds[0].digest == adapter().digest
    for one in kinds:
        assert parse_adapter(to_bytes(one)) == one
        assert summarize(to_bytes(one)).digest == one.digest
    with pytest.raises(InvalidAdapterError, match="apply is 'late'"):
        adapter(apply="late")


def test_weights_act_on_every_token_so_a_window_is_not_folded(base):
    with pytest.raises(InvalidAdapterError, match="edits 'prompt' alone, and weights act on every"):
        fold(base.adapter(1, apply="prompt"), base.model)
