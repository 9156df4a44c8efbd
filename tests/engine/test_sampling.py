"""Tokens are drawn row by row, as if each were alone."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redmux_server.engine.request import Request, SamplingParams
from redmux_server.engine.sampling import NonFinite, sample


def row(num_output=0, logprobs=True, **params):
    request = Request(
        prompt_ids=[1], max_tokens=9, sampling=SamplingParams(**params),
        stop_token_ids=frozenset(), tenant="", adapter=None, logprobs=logprobs,
        sink=lambda event: None,
    )  # fmt: skip
    request.token_ids += [2] * num_output
    return request


def kept(probs, top_k, top_p):
    """The set that may be drawn, by the definition, in plain numpy."""
    order = np.argsort(-probs, kind="stable")
    if top_k:
        order = order[:top_k]
    mass, chosen = 0.0, []
    total = probs[order].sum() if top_k else 1.0
    for index in order:
        if mass >= top_p * total:
            break
        chosen.append(int(index))
        mass += probs[index]
    return set(chosen)


def test_greedy_takes_the_most_likely_and_tells_its_logprob():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    tokens = sample(logits, [row() for _ in range(5)])
    expected = torch.log_softmax(logits.double(), -1).max(-1)
    assert [t.token_id for t in tokens] == expected.indices.tolist()
    assert [t.logprob for t in tokens] == pytest.approx(expected.values.tolist(), abs=1e-5)
    assert sample(logits[:1], [row(logprobs=False)])[0].logprob is None


PARAMS = st.builds(
    lambda temperature, top_k, top_p, seed, num_output: row(
        num_output=num_output, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    ),
    st.sampled_from([0.0, 1e-30, 0.3, 1.0, 40.0]), st.sampled_from([0, 1, 5, 50]),
    st.sampled_from([0.01, 0.5, 0.95, 1.0]), st.integers(0, 2**64 - 1), st.integers(0, 7),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(PARAMS, min_size=1, max_size=9), st.integers(0, 99), st.randoms())
def test_a_row_is_the_same_alone_and_among_others(requests, seed, random):
    """Bit for bit, at the vocabulary size where long rows are split over threads."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(len(requests), 49152, generator=generator)
    together = sample(logits, requests)
    order = list(range(len(requests)))
    random.shuffle(order)
    shuffled = sample(logits[order], [requests[i] for i in order])
    for i, request in enumerate(requests):
        assert sample(logits[i : i + 1], [request]) == [together[i]]
        assert shuffled[order.index(i)] == together[i]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.7}, {"temperature": 1.0, "top_k": 6, "top_p": 0.8},
    ],
)  # fmt: skip
def test_draws_follow_the_distribution(params):
    logits = torch.tensor([1.0, 0.2, 2.0, -1.0, 0.0, 1.5, -3.0, 0.7])
    probs = torch.softmax(logits.double() / params["temperature"], -1).numpy()
    allowed = sorted(kept(probs, params.get("top_k", 0), params.get("top_p", 1.0)))
    expected = probs[allowed] / probs[allowed].sum()
    n = 4000
    requests = [row(seed=i, logprobs=False, **params) for i in range(n)]
    drawn = [t.token_id for t in sample(logits.expand(n, -1), requests)]
    assert set(drawn) <= set(allowed)
    counts = np.array([drawn.count(i) for i in allowed])
    chi_square = ((counts - n * expected) ** 2 / (n * expected)).sum()
    # Six standard deviations above the mean of the distribution: one draw in millions.
    freedom = len(allowed) - 1
    assert chi_square < freedom + 6 * math.sqrt(2 * freedom) + 6


def test_successive_tokens_of_one_seed_are_independent_draws():
    logits = torch.zeros(2000, 2)
    requests = [row(num_output=i, seed=5, temperature=1.0) for i in range(2000)]
    drawn = [t.token_id for t in sample(logits, requests)]
    assert 850 < sum(drawn) < 1150
    repeats = sum(a == b for a, b in itertools.pairwise(drawn))
    assert 850 < repeats < 1150
    assert sample(logits, requests) == [*sample(logits, requests)]


def test_top_p_reaches_beyond_the_first_candidates():
    """A flat row: the nucleus of 0.9 is 0.9 of a vocabulary far larger than the candidates."""
    vocab = 5000
    logits = torch.linspace(0, 1e-3, vocab)
    requests = [row(seed=i, temperature=1.0, top_p=0.9) for i in range(600)]
    drawn = {t.token_id for t in sample(logits.expand(600, -1), requests)}
    lowest = vocab - math.ceil(0.9 * vocab) - 1
    assert min(drawn) >= lowest
    assert min(drawn) < vocab - 1024 - 1000


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_told_and_harms_no_other(value):
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    requests = [row(), row(temperature=1.0, seed=3), row(temperature=1.0, seed=4), row()]
    clean = sample(logits, requests)
    for bad in range(4):
        spoiled = logits.clone()
        spoiled[bad, 7] = value
        got = sample(spoiled, requests)
        assert got[bad] == NonFinite()
        assert [g for i, g in enumerate(got) if i != bad] == [
            c for i, c in enumerate(clean) if i != bad
        ]


def test_a_token_of_no_probability_is_never_drawn():
    logits = torch.tensor([[0.0, float("-inf"), 0.0]])
    requests = [row(seed=i, temperature=100.0) for i in range(300)]
    drawn = {t.token_id for t in sample(logits.expand(300, -1), requests)}
    assert drawn == {0, 2}


def test_the_smallest_temperature_is_greedy():
    logits = torch.tensor([[1.0, 1.0001, 0.0]])
    got = sample(logits, [row(seed=3, temperature=1e-38)])
    assert got[0].token_id == 1
