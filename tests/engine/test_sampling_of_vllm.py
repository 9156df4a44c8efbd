"""Options of sampling beside vLLM's own code; needs its wheel, which `make test-vllm` fetches."""

from types import SimpleNamespace

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
from vllm_at_hand import vllm_sampling, wheel

from redmux_server.engine.request import SamplingParams

pytestmark = pytest.mark.skipif(wheel() is None, reason="no vLLM: `make test-vllm` fetches it")

SHARED = (
    "temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "allowed_token_ids", "bad_token_ids", "bad_sequences",
    "min_tokens",
)  # fmt: skip
VOCAB = 60


@pytest.fixture(scope="module")
def of_vllm():
    """Gives probabilities of the tokens that may be drawn, by vLLM's sampler."""
    with vllm_sampling(wheel()) as load:
        yield Peer(load)


class Peer:
    def __init__(self, load):
        self._sampler = load("vllm.v1.sample.sampler").Sampler()
        self._metadata = load("vllm.v1.sample.metadata").SamplingMetadata
        self._cut = load("vllm.v1.sample.ops.topk_topp_sampler").apply_top_k_top_p
        builtin = load("vllm.v1.sample.logits_processor.builtin")
        self._kinds = [
            builtin.MinTokensLogitsProcessor,
            builtin.LogitBiasLogitsProcessor,
            builtin.MinPLogitsProcessor,
        ]
        self._all = load("vllm.v1.sample.logits_processor.state").LogitsProcessors
        self._batch = load("vllm.v1.sample.logits_processor.interface").BatchUpdate

    def __call__(self, logits, temperature=1.0, **options):
        given = SamplingParams(temperature=temperature, **options)
        kept = []

        def draw(logits, generators, k, p):
            kept.append(self._cut(logits, k, p).softmax(-1)[0])
            return torch.zeros(1, dtype=torch.int64), None

        self._sampler.topk_topp_sampler.forward = draw
        self._sampler(logits.clone(), self._told(given))
        return kept[0]

    def _told(self, given):
        def value(one, dtype=torch.float32):
            return torch.tensor([one], dtype=dtype)

        allowed = torch.zeros(1, VOCAB, dtype=torch.bool)
        allowed[0, list(given.allowed_token_ids)] = True
        words = [*([i] for i in given.bad_token_ids), *map(list, given.bad_sequences)]
        return self._metadata(
            temperature=value(given.temperature), all_greedy=False, all_random=True,
            top_p=value(given.top_p) if given.top_p < 1 else None,
            top_k=value(given.top_k, torch.int32) if given.top_k else None,
            generators={}, max_num_logprobs=None,
            no_penalties=not given.penalises,
            prompt_token_ids=value(PROMPT, torch.int64),
            frequency_penalties=value(given.frequency_penalty),
            presence_penalties=value(given.presence_penalty),
            repetition_penalties=value(given.repetition_penalty),
            output_token_ids=[OUTPUT],
            allowed_token_ids_mask=~allowed if given.allowed_token_ids else None,
            bad_words_token_ids={0: words} if words else {},
            logitsprocs=self._all(self._processors(given)),
        )  # fmt: skip

    def _processors(self, given):
        config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=1))
        params = SimpleNamespace(
            min_p=given.min_p, logit_bias=dict(given.logit_bias), min_tokens=given.min_tokens,
            all_stop_token_ids=set(STOPS), structured_outputs=None,
        )  # fmt: skip
        update = self._batch(
            batch_size=1, removed=[], added=[(0, params, PROMPT, OUTPUT)], moved=[]
        )
        for kind in self._kinds:
            processor = kind(config, torch.device("cpu"), False)
            processor.update_state(update)
            yield processor


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={name: st.sampled_from(VALUES.get(name, [OPTIONS.get(name)])) for name in SHARED},
    ).filter(lambda params: not {"min_p", "top_p"} <= params.keys()),
    st.integers(0, 10_000),
)
def test_any_options_together_are_what_vllm_makes_of_them(of_vllm, params, seed):
    """But for min_p with top_p, see below."""
    logits = random_logits(1, VOCAB, seed)
    got, expected = distribution(row(**params), logits), of_vllm(logits, **params)
    assert ((got > 0) == (expected > 0)).all()
    assert got.numpy() == pytest.approx(expected.numpy(), abs=1e-5)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([1, 2, 5, 20]),
    st.sampled_from([None, 0.21, 0.63, 0.947]),
    st.integers(0, 10_000),
)
def test_ties_are_cut_as_vllm_cuts_them(of_vllm, top_k, top_p, seed):
    """All that are as likely as the last of top_k stay; of ties top_p keeps equally many."""
    logits = random_logits(1, VOCAB, seed).round()
    params = {"top_k": top_k} | ({"top_p": top_p} if top_p else {})
    got, expected = distribution(row(**params), logits), of_vllm(logits, **params)
    if top_p is None:
        assert ((got > 0) == (expected > 0)).all()
    assert got.sort().values.numpy() == pytest.approx(expected.sort().values.numpy(), abs=1e-5)


def test_vllm_takes_top_p_of_what_min_p_leaves(of_vllm):
    """Where ours keeps 0.75 of all: docs/sampling.md says so."""
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, :5] = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04]).log()
    params = {"top_p": 0.75, "min_p": 0.4}
    assert (of_vllm(logits, **params) > 0).nonzero()[:, 0].tolist() == [0, 1]
    assert (distribution(row(**params), logits) > 0).nonzero()[:, 0].tolist() == [0, 1, 2]
