"""Who may open how many requests: nobody fills the queue for others."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redmux.errors import ResourceExhaustedError
from redmux_server.engine.places import Places
from redmux_server.engine.request import Request, SamplingParams


def request(tenant):
    return Request(
        prompt_ids=[1], max_tokens=1, sampling=SamplingParams(), stop_token_ids=frozenset(),
        tenant=tenant, adapter=None, logprobs=False, sink=lambda event: None,
    )  # fmt: skip


def fill(places, tenant, limit=10_000):
    """Opens as many requests of a tenant as it may; returns them."""
    taken = []
    while len(taken) < limit and places.has_place(tenant):
        taken.append(request(tenant))
        places.take(taken[-1:])
    return taken


def test_a_tenant_that_is_alone_gets_all_places_but_an_eighth():
    places = Places(576)
    assert len(fill(places, "a")) == places.most_for_one == 504


@pytest.mark.parametrize("num_places", [2, 3, 8, 80, 576])
def test_whoever_comes_second_finds_a_place(num_places):
    places = Places(num_places)
    fill(places, "a")
    assert len(fill(places, "b")) >= 1


def test_a_single_place_is_for_whoever_comes_first():
    places = Places(1)
    assert len(fill(places, "a")) == 1
    assert not places.has_place("b")


def test_places_move_to_those_who_have_fewer_as_requests_end():
    places = Places(80)
    mine, others = fill(places, "a"), fill(places, "b")
    for _ in range(100):  # both ask at once for every place that becomes free
        for held, tenant in ((mine, "a"), (others, "b")):
            places.give_back(held.pop(0))
            held += fill(places, tenant)
    assert abs(len(mine) - len(others)) <= 4
    assert len(mine) + len(others) >= 70


def test_requests_of_a_call_are_taken_together_or_not_at_all():
    places = Places(8)
    with pytest.raises(ResourceExhaustedError):
        places.take([request("a")] * 8)
    assert len(fill(places, "a")) == 7


def test_a_refusal_says_that_the_share_is_full_or_that_others_fill_the_queue():
    places = Places(16)
    fill(places, "a")
    with pytest.raises(ResourceExhaustedError, match=r"the share of this API .* 14 requests of"):
        places.take([request("a")])
    fill(places, "b")
    fill(places, "c")
    with pytest.raises(ResourceExhaustedError, match="others fill the queue: 16 of 16 places"):
        places.take([request("d")])
    with pytest.raises(ResourceExhaustedError, match="requests of others fill the queue: 15 of 16"):
        places.take([request("c")])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.data())
def test_places_are_never_overdrawn_and_never_held_back_from_who_has_none(num_places, data):
    places, held = Places(num_places), []
    for _ in range(data.draw(st.integers(1, 40))):
        tenant = data.draw(st.sampled_from("abcdefgh"))
        if held and data.draw(st.booleans()):
            places.give_back(held.pop(data.draw(st.integers(0, len(held) - 1))))
            continue
        count = data.draw(st.integers(1, num_places))
        numbers = Counter(r.tenant for r in held)
        new = [request(tenant) for _ in range(count)]
        try:
            places.take(new)
        except ResourceExhaustedError:
            left = num_places - (len(held) - numbers[tenant])
            assert numbers[tenant] + count > left - -(-left // 8)
            assert not (numbers[tenant] == 0 and count == 1 and left)
        else:
            held += new
        assert len(held) <= num_places
