"""Options of sampling: each acts on its own row alone, as transformers and vLLM define it."""

import itertools

import numpy as np
import pytest
import torch
from engine.rows_with_options import (
    OPTIONS,
    OUTPUT,
    PROMPT,
    STOPS,
    VALUES,
    distribution,
    random_logits,
    row,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from redmux_server.engine.candidates import candidates
from redmux_server.engine.logit_edits import edited
from redmux_server.engine.request import SamplingParams, Token
from redmux_server.engine.sampling import Exhausted, sample

PAIRS = [(), *((name,) for name in OPTIONS), *itertools.combinations(OPTIONS, 2)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_option_and_pair_of_options_has_the_same_bits_alone_and_in_company(temperature):
    def make(names):
        return row(names, **{} if "temperature" in names else {"temperature": temperature})

    logits = random_logits(len(PAIRS), 49152)
    tokens = sample(logits, [make(names) for names in PAIRS])
    rows = edited(logits, [make(names) for names in PAIRS])
    for i, names in enumerate(PAIRS):
        assert sample(logits[i : i + 1], [make(names)]) == [tokens[i]], names
        assert edited(logits[i : i + 1], [make(names)])[0].equal(rows[i]), names


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sets(st.sampled_from(sorted(OPTIONS)), max_size=6),
            st.lists(st.integers(0, 40), min_size=1, max_size=12),
            st.lists(st.integers(0, 40), max_size=12), st.sampled_from([0.0, 1.0]),
            st.integers(0, 2**64 - 1),
        ),
        min_size=2, max_size=8,
    ),
    st.integers(0, 99), st.randoms(),
)  # fmt: skip
def test_any_mix_of_options_has_the_same_bits_in_any_order(drawn, seed, random):
    def make(i):
        names, prompt, output, temperature, request_seed = drawn[i]
        return row(names - {"temperature"}, prompt, output, temperature=temperature,
                   seed=request_seed)  # fmt: skip

    logits = random_logits(len(drawn), 33000, seed)  # long rows are split over threads
    together = sample(logits, [make(i) for i in range(len(drawn))])
    order = list(range(len(drawn)))
    random.shuffle(order)
    shuffled = sample(logits[order], [make(i) for i in order])
    for i in range(len(drawn)):
        assert sample(logits[i : i + 1], [make(i)]) == [together[i]]
        assert shuffled[order.index(i)] == together[i]


def test_rows_without_options_keep_their_bits_beside_rows_with_all():
    logits = random_logits(6, 49152)
    plain = [row(seed=i) for i in range(3)]
    alone = sample(logits[:3], plain)
    assert sample(logits, [*plain, *(row(OPTIONS) for _ in range(3))])[:3] == alone


def test_the_history_grows_by_the_tokens_of_a_step():
    """A request that is asked step by step is what one is that comes with all its tokens."""
    names = ["presence_penalty", "frequency_penalty", "repetition_penalty", "no_repeat_ngram"]
    stepwise = row(names, output=[])
    logits = random_logits(1, 60)
    for token_id in OUTPUT:
        edited(logits, [stepwise])
        stepwise.token_ids.append(token_id)
    assert edited(logits, [stepwise]).equal(edited(logits, [row(names)]))


# -- what transformers makes of it ----------------------------------------------------------------


def of_transformers(request, logits, processors):
    ids = torch.tensor([request.token_ids])
    return torch.softmax(hf.LogitsProcessorList(processors)(ids, logits.clone()), -1)[0]


WARPERS = {
    "temperature": lambda v: hf.TemperatureLogitsWarper(v),
    "top_k": lambda v: hf.TopKLogitsWarper(v),
    "top_p": lambda v: hf.TopPLogitsWarper(v),
    "min_p": lambda v: hf.MinPLogitsWarper(v),
    "typical_p": lambda v: hf.TypicalLogitsWarper(v),
}
PROCESSORS = {
    "logit_bias": lambda v: hf.SequenceBiasLogitsProcessor({(i,): b for i, b in v.items()}),
    "repetition_penalty": lambda v: hf.RepetitionPenaltyLogitsProcessor(v),
    "no_repeat_ngram": lambda v: hf.NoRepeatNGramLogitsProcessor(v),
    "bad_token_ids": lambda v: hf.NoBadWordsLogitsProcessor([[i] for i in v]),
    "bad_sequences": lambda v: hf.NoBadWordsLogitsProcessor([list(s) for s in v]),
    "min_tokens": lambda v: hf.MinNewTokensLengthLogitsProcessor(
        len(PROMPT), v, torch.tensor(sorted(STOPS))
    ),
} | WARPERS  # in the order in which transformers applies them


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.sampled_from(VALUES.get(name, [OPTIONS.get(name)])) for name in PROCESSORS
        },
    ),
    st.integers(0, 10_000),
)
def test_any_options_together_are_what_transformers_makes_of_them(params, seed):
    logits = random_logits(1, 60, seed)
    request = row(**params)
    expected = of_transformers(
        request, logits, [make(params[name]) for name, make in PROCESSORS.items() if name in params]
    )
    got = distribution(request, logits)
    # A token at the very edge may fall on either side of it by rounding.
    differing = (got > 0) != (expected > 0)
    assert not differing.any()
    assert got.numpy() == pytest.approx(expected.numpy(), abs=1e-5)


@pytest.mark.parametrize("name", ["top_p", "min_p", "typical_p"])
@pytest.mark.parametrize("flat", [False, True])
def test_cuts_reach_beyond_the_first_candidates(name, flat):
    """With a flat row, of more tokens than are looked at first."""
    logits = random_logits(1, 5000) * (0.01 if flat else 1)
    request = row(**{name: 0.9})
    expected = of_transformers(request, logits, [WARPERS[name](0.9)])
    got = distribution(request, logits)
    assert got.numpy() == pytest.approx(expected.numpy(), abs=1e-5)
    assert not flat or (got > 0).sum() > 1024


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([1, 2, 5, 20]), st.integers(0, 10_000))
def test_all_that_are_as_likely_as_the_last_of_top_k_stay(top_k, seed):
    logits = random_logits(1, 60, seed).round()
    request = row(top_k=top_k)
    expected = of_transformers(request, logits, [WARPERS["top_k"](top_k)])
    assert distribution(request, logits).numpy() == pytest.approx(expected.numpy(), abs=1e-5)


# -- what vLLM makes of it ------------------------------------------------------------------------


def test_penalties_are_by_the_formula_of_vllm():
    """vllm/model_executor/layers/utils.py: apply_penalties."""
    logits = random_logits(1, 60)
    names = ["repetition_penalty", "frequency_penalty", "presence_penalty"]
    got = edited(logits, [row(names)])
    output_counts = torch.zeros(1, 60).index_add(
        1, torch.tensor(OUTPUT), torch.ones(1, len(OUTPUT))
    )
    seen = torch.zeros(1, 60, dtype=torch.bool)
    seen[0, PROMPT + OUTPUT] = True
    expected = logits.clone()
    penalties = torch.where(seen, torch.tensor(OPTIONS["repetition_penalty"]), 1.0)
    expected *= torch.where(expected > 0, 1.0 / penalties, penalties)
    expected -= torch.tensor(OPTIONS["frequency_penalty"]) * output_counts
    expected -= torch.tensor(OPTIONS["presence_penalty"]) * (output_counts > 0)
    # vLLM multiplies by the inverse where transformers divides: the last bit may differ.
    assert got.numpy() == pytest.approx(expected.numpy(), rel=3e-7)
    untouched = ~seen
    assert got[untouched].equal(expected[untouched])


def test_presence_and_frequency_look_at_the_output_alone_repetition_at_the_prompt_too():
    logits = torch.ones(1, 60)
    for name in ("presence_penalty", "frequency_penalty"):
        changed = (edited(logits, [row([name])]) != 1)[0].nonzero()[:, 0].tolist()
        assert changed == sorted(set(OUTPUT))
    changed = (edited(logits, [row(["repetition_penalty"])]) != 1)[0].nonzero()[:, 0].tolist()
    assert changed == sorted({*PROMPT, *OUTPUT})


def test_bad_words_have_to_be_in_the_output_as_a_whole():
    """As in vLLM; transformers bans what completes a word that the prompt has begun, too."""
    sequence = (5, 6)
    for output, is_banned in [([], False), ([6], False), ([5], True), ([5, 6], False)]:
        request = row(prompt=[1, 5], output=output, bad_sequences=(sequence,))
        assert (edited(torch.zeros(1, 60), [request])[0, 6] == -torch.inf) == is_banned
    theirs = hf.NoBadWordsLogitsProcessor([list(sequence)])
    assert theirs(torch.tensor([[1, 5]]), torch.zeros(1, 60))[0, 6] == -torch.inf


def test_min_p_takes_nothing_from_the_mass_that_top_p_looks_at():
    """As in transformers; vLLM cuts by min_p first, and takes top_p of what is left."""
    probs = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])
    ids, _ = candidates(probs, SamplingParams(top_p=0.75, min_p=0.5))
    assert ids.tolist() == [0, 1, 2]
    left = probs[:3] / probs[:3].sum()
    assert (left.cumsum(0) - left < 0.75).sum() == 2  # of vLLM


# -- the rest -------------------------------------------------------------------------------------


def test_a_ban_wins_over_a_bias_and_an_allowance():
    request = row(temperature=0.0, logit_bias={7: 100.0}, allowed_token_ids=(7, 8),
                  bad_token_ids=(7,))  # fmt: skip
    assert sample(torch.zeros(1, 60), [request])[0].token_id == 8


def test_a_row_without_any_token_left_is_told_and_harms_no_other():
    logits = random_logits(3, 60)
    bad = row(allowed_token_ids=(7,), bad_token_ids=(7,))
    others = [row(), row(["min_p"])]
    alone = [sample(logits[i : i + 1], [others[i]])[0] for i in range(2)]
    assert sample(logits, [*others, bad]) == [*alone, Exhausted()]


def test_no_stop_token_comes_before_min_tokens_are_there():
    logits = torch.zeros(1, 60)
    logits[0, 3] = 9
    assert sample(logits, [row(output=[1] * 8, min_tokens=9, temperature=0.0)])[0].token_id != 3
    assert sample(logits, [row(output=[1] * 9, min_tokens=9, temperature=0.0)])[0].token_id == 3


def test_the_first_of_the_likeliest_is_what_greedy_takes_with_the_same_number():
    logits = random_logits(4, 300)
    logits[1] = 0.0  # all of one value: the lowest ids
    logits[2, [17, 40]] = 50.0
    tokens = sample(logits, [row(temperature=0.0, num_top=5) for _ in range(4)])
    for token in tokens:
        assert token.top[0] == (token.token_id, token.logprob)
        assert len(token.top) == 5
    assert [i for i, _ in tokens[1].top] == [0, 1, 2, 3, 4]
    assert [i for i, _ in tokens[2].top[:2]] == [17, 40]
    expected = torch.log_softmax(logits.double(), -1)[0].sort(descending=True)
    assert [i for i, _ in tokens[0].top] == expected.indices[:5].tolist()
    assert [v for _, v in tokens[0].top] == pytest.approx(expected.values[:5].tolist(), abs=1e-5)


def test_logprobs_are_of_the_model_whatever_the_options():
    logits = random_logits(1, 300)
    with_all, plain = row(OPTIONS), row(temperature=0.0)
    (told,), (greedy,) = sample(logits, [with_all]), sample(logits, [plain])
    assert isinstance(told, Token)
    assert told.top == greedy.top
    assert told.logprob == torch.log_softmax(logits, -1)[0, told.token_id].item()


def test_the_row_of_the_caller_is_left_as_it_is():
    logits = random_logits(2, 300)
    before = logits.clone()
    sample(logits, [row(OPTIONS), row(OPTIONS, temperature=0.0)])
    assert np.array_equal(logits.numpy(), before.numpy())
