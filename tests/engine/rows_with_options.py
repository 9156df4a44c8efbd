"""Rows with options of sampling, and what ours makes of them."""

import torch

from redmux_server.engine.candidates import candidates
from redmux_server.engine.logit_edits import edited
from redmux_server.engine.request import Request, SamplingParams

STOPS = frozenset({3, 4})
PROMPT = [5, 6, 7, 5, 6, 8, 9, 5]
OUTPUT = [6, 10, 11, 10, 5, 6]
OPTIONS = {
    "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.05, "typical_p": 0.6,
    "presence_penalty": 1.5, "frequency_penalty": -0.7, "repetition_penalty": 1.3,
    "no_repeat_ngram": 2, "logit_bias": {6: 4.0, 12: -100.0, 40: 2.5},
    "allowed_token_ids": (3, 5, 6, 7, 8, 10, 12, 30, 31, 40), "bad_token_ids": (7, 31),
    "bad_sequences": ((5, 6, 8), (10, 30), (6, 40)), "min_tokens": 9,
}  # fmt: skip
VALUES = {
    "temperature": [0.3, 1.7], "top_k": [1, 5, 40], "top_p": [0.2, 0.6, 0.95],
    "min_p": [0.001, 0.05, 0.5, 1.0], "typical_p": [0.05, 0.3, 0.9],
    "repetition_penalty": [0.6, 2.0], "no_repeat_ngram": [1, 2, 3, 4],
}  # fmt: skip


def row(names=(), prompt=PROMPT, output=OUTPUT, logprobs=True, num_top=3, **params):
    """A request with these options, as `OPTIONS` has them, and a temperature where none is."""
    params = {"temperature": 1.0, "seed": 11} | {name: OPTIONS[name] for name in names} | params
    request = Request(
        prompt_ids=list(prompt), max_tokens=99, sampling=SamplingParams(**params),
        stop_token_ids=STOPS, tenant="", adapter=None, logprobs=logprobs,
        sink=lambda event: None, num_top=num_top,
    )  # fmt: skip
    request.token_ids += output
    return request


def random_logits(num, vocab, seed=0):
    return 3 * torch.randn(num, vocab, generator=torch.Generator().manual_seed(seed))


def distribution(request, logits):
    """Probabilities of the tokens that may be drawn, by ours."""
    rows = edited(logits, [request])
    probs = torch.softmax(rows / request.sampling.temperature, -1)[0]
    ids, values = candidates(probs, request.sampling)
    found = torch.zeros_like(probs)
    found[ids] = values / values.sum()
    return found
