"""What a request's options change of its row of logits, before a token is chosen from it.

In this order, as vLLM and transformers have it: biases; the repetition, frequency and presence
penalties; tokens that must not come, which are minus infinity. docs/sampling.md tells each.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from redmux_server.engine.history import History, Ids
from redmux_server.engine.request import Request


class EditState:
    """What the edits of a request need, kept between its steps."""

    def __init__(self, request: Request) -> None:
        params = request.sampling
        self.history = History(request.prompt_ids, request.max_length)
        self.allowed: Ids = np.asarray(params.allowed_token_ids, np.int64)
        self.biased: Ids = np.fromiter(params.logit_bias, np.int64)
        self.biases = np.fromiter(params.logit_bias.values(), np.float32)
        self.bad: Ids = np.asarray(params.bad_token_ids, np.int64)
        self.stops: Ids = np.fromiter(request.stop_token_ids, np.int64)

    def banned(self, request: Request) -> Ids:
        """Returns the tokens that must not come next, some of them more than once."""
        params = request.sampling
        completed = [s[-1] for s in params.bad_sequences if self.history.would_complete(s)]
        banned = [self.bad, np.asarray(completed, np.int64)]
        if params.no_repeat_ngram:
            banned.append(self.history.would_repeat(params.no_repeat_ngram))
        if request.num_output < params.min_tokens:
            banned.append(self.stops)
        return np.concatenate(banned)


def edited(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Returns what each request makes of its row of `logits` [requests, vocab], as float32.

    Only places that an option names are touched, of all rows in one operation each, and each by
    arithmetic of its own: so a row does not depend on its neighbours.
    """
    rows = logits.to(torch.float32, copy=True)
    states = [_state(request) for request in requests]
    places = _Places(rows)
    if any(len(state.biased) for state in states):
        biases = np.concatenate([state.biases for state in states])
        biased = places.of([state.biased for state in states])
        places.values[biased] += torch.from_numpy(biases).to(rows.device)
    _penalise(places, requests, states)
    banned = [state.banned(request) for state, request in zip(states, requests, strict=True)]
    places.values[places.of(banned)] = -torch.inf
    for row, state in zip(rows, states, strict=True):
        if len(state.allowed):
            allowed = torch.from_numpy(state.allowed).to(rows.device)
            kept = row[allowed]
            row.fill_(-torch.inf)[allowed] = kept
    return rows


def _state(request: Request) -> EditState:
    if request.edit_state is None:
        request.edit_state = EditState(request)
    request.edit_state.history.extend(request.token_ids)
    return request.edit_state


class _Places:
    """The values of rows [rows, vocab] one behind the other, and where a token of a row is."""

    def __init__(self, rows: Tensor) -> None:
        self.values = rows.view(-1)
        self._starts = np.arange(len(rows)) * rows.shape[1]

    def of(self, ids: Sequence[Ids]) -> Tensor:
        """Returns the indices of these tokens of each row."""
        starts = np.repeat(self._starts, [len(of_row) for of_row in ids])
        return torch.from_numpy(np.concatenate(ids) + starts).to(self.values.device)


def _penalise(places: _Places, requests: Sequence[Request], states: Sequence[EditState]) -> None:
    if not any(request.sampling.penalises for request in requests):
        return
    known = [
        state.history.known if request.sampling.penalises else state.biased[:0]
        for request, state in zip(requests, states, strict=True)
    ]
    counted = [s.history.counts[: len(ids)] for s, ids in zip(states, known, strict=True)]
    lengths = [len(ids) for ids in known]
    device = places.values.device

    def spread(values: list[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.asarray(values, np.float32), lengths)).to(device)

    params = [request.sampling for request in requests]
    repetition = spread([p.repetition_penalty for p in params])
    counts = torch.from_numpy(np.concatenate(counted)).to(device)
    penalised = places.of(known)
    values = places.values[penalised]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= spread([p.frequency_penalty for p in params]) * counts
    values -= spread([p.presence_penalty for p in params]) * (counts > 0)
    places.values[penalised] = values
