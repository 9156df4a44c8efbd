"""Draw the next token of every row at once, each row as if it were alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from redmux_server.engine.candidates import candidates
from redmux_server.engine.grammar import Bar, allows, apply_masks, bar_tokens
from redmux_server.engine.logit_edits import edited
from redmux_server.engine.request import Request, Token


@dataclass(frozen=True, slots=True)
class NonFinite:
    """The row holds NaN or infinity: no token can be drawn from it."""


@dataclass(frozen=True, slots=True)
class Exhausted:
    """No token may come next, and why."""

    why: str = "the grammar and the options leave no token that may come next"


@torch.inference_mode()
def sample(
    logits: Tensor, requests: Sequence[Request], bar: Bar = bar_tokens
) -> list[Token | NonFinite | Exhausted]:
    """Draws one token per row of `logits` [requests, vocab]; `bar` takes out what grammars bar.

    Row i depends on row i and request i alone: the random number is a hash of the request's seed
    and the index of the token, so neither neighbours nor scheduling move it. What the grammar bars
    goes before all other options; log-probabilities are those of the row as the model computed it.
    """
    ids, is_finite = likeliest(logits)
    tokens: list[Token | NonFinite | Exhausted] = [
        Token(token_id, None) if ok else NonFinite()
        for token_id, ok in zip(ids, is_finite, strict=True)
    ]
    as_they_are, with_edits = [], []
    for i, request in enumerate(requests):
        if is_finite[i] and (request.sampling.edits_logits or request.matcher is not None):
            if not _greedy_is_allowed(ids[i], request):
                with_edits.append(i)
        elif is_finite[i] and request.sampling.temperature > 0:
            as_they_are.append(i)
    if as_they_are:
        chosen = _draw(logits[as_they_are], [requests[i] for i in as_they_are])
        for i, token_id in zip(as_they_are, chosen, strict=True):
            tokens[i] = Token(token_id, None)
    if with_edits:
        told = _choose_edited(logits[with_edits], [requests[i] for i in with_edits], bar)
        for i, token in zip(with_edits, told, strict=True):
            tokens[i] = token
    _tell_logprobs(logits, requests, tokens)
    return tokens


def _greedy_is_allowed(likeliest_id: int, request: Request) -> bool:
    """Whether a request wants the likeliest token, and its grammar allows that very one."""
    params, matcher = request.sampling, request.matcher
    if params.temperature > 0 or params.edits_logits or matcher is None or matcher.mask is None:
        return False
    return allows(matcher.mask, likeliest_id)


def _choose_edited(rows: Tensor, requests: Sequence[Request], bar: Bar) -> list[Token | Exhausted]:
    """Draws from rows that are nobody else's."""
    apply_masks(rows, [None if r.matcher is None else r.matcher.mask for r in requests], bar)
    if any(r.sampling.edits_logits for r in requests):
        rows = edited(rows, requests)
    ids, is_left = likeliest(rows)
    drawn = [i for i, r in enumerate(requests) if r.sampling.temperature > 0 and is_left[i]]
    if drawn:
        for i, token_id in zip(drawn, _draw(rows[drawn], [requests[i] for i in drawn]),
                               strict=True):  # fmt: skip
            ids[i] = token_id
    return [
        Token(token_id, None) if ok else _exhausted(request)
        for token_id, ok, request in zip(ids, is_left, requests, strict=True)
    ]


def _exhausted(request: Request) -> Exhausted:
    error = "" if request.matcher is None else request.matcher.error
    return Exhausted(error) if error else Exhausted()


def _tell_logprobs(
    logits: Tensor, requests: Sequence[Request], tokens: list[Token | NonFinite | Exhausted]
) -> None:
    """Puts log-probabilities to the tokens of the requests that ask for them."""
    asked = [(i, token.token_id) for i, token in enumerate(tokens)
             if requests[i].logprobs and isinstance(token, Token)]  # fmt: skip
    if not asked:
        return
    rows = logits[[i for i, _ in asked]]
    # log_softmax works row by row, unlike logsumexp, which may split one long row over threads.
    logprobs = torch.log_softmax(rows.float(), -1)
    chosen = torch.tensor([token_id for _, token_id in asked], device=logits.device)[:, None]
    values = logprobs.gather(1, chosen)[:, 0].tolist()
    top = top_of(rows, logprobs, [requests[i].num_top for i, _ in asked])
    for (i, token_id), value, of_row in zip(asked, values, top, strict=True):
        tokens[i] = Token(token_id, value, of_row)


def top_of(
    logits: Tensor, logprobs: Tensor, numbers: Sequence[int]
) -> list[list[tuple[int, float]]]:
    """Returns per row so many of the likeliest tokens: (token id, its value in `logprobs`).

    Likeliest first, and of equal logits the lowest id, so the first is what greedy chooses.
    """
    most = min(max(numbers), logits.shape[-1])
    if not most:
        return [[] for _ in numbers]
    lowest = logits.topk(most, -1).values[:, -1:]
    top = []
    for row, values, number in zip(logits >= lowest, zip(logits, logprobs, strict=True), numbers,
                                   strict=True):  # fmt: skip
        ids = row.nonzero()[:, 0]  # in the order of ids, which a stable sort keeps
        ids = ids[values[0][ids].argsort(descending=True, stable=True)[:number]]
        top.append(list(zip(ids.tolist(), values[1][ids].tolist(), strict=True)))
    return top


def likeliest(logits: Tensor) -> tuple[list[int], list[bool]]:
    """Returns per row the id of its maximum, and whether a token can be drawn from the row.

    NaN and +inf win every maximum, and where only -inf is left, that does.
    """
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        # NumPy compares many values at a time; torch takes one after the other, in one thread.
        values = logits.numpy()
        indices = values.argmax(-1)
        is_finite = np.isfinite(values[np.arange(len(values)), indices])
        return indices.tolist(), is_finite.tolist()
    highest, ids = logits.max(-1)
    return ids.tolist(), highest.isfinite().tolist()


def _draw(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    params = [r.sampling for r in requests]
    device = logits.device
    # In fp32 a tiny temperature would be 0, and 0 / 0 is no number.
    tiny = torch.finfo(torch.float32).tiny
    temperature = torch.tensor([[max(p.temperature, tiny)] for p in params], device=device)
    # Shifted before the division, so that a tiny temperature cannot overflow to infinity.
    scaled = (logits.float() - logits.float().amax(-1, keepdim=True)) / temperature
    probs = torch.softmax(scaled, -1)
    points = [_uniform(r.sampling.seed, r.num_output) for r in requests]
    point = torch.tensor(points, dtype=torch.float64, device=device)[:, None]
    ids = [0] * len(params)
    plain = [i for i, p in enumerate(params) if not p.restricts]
    if plain:
        for i, index in zip(plain, _invert(probs[plain], point[plain]).tolist(), strict=True):
            ids[i] = index
    for i in sorted(set(range(len(params))) - set(plain)):
        order, kept = candidates(probs[i], params[i])
        ids[i] = int(order[_invert(kept[None], point[i : i + 1])])
    return ids


def _invert(probs: Tensor, point: Tensor) -> Tensor:
    """Returns per row the index where the cumulated probability passes point * total."""
    cumulated = probs.double().cumsum(-1)
    index = torch.searchsorted(cumulated, point * cumulated[:, -1:], right=True)[:, 0]
    return index.clamp(max=probs.shape[1] - 1)


def _uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on the two arguments only (splitmix64)."""
    mask = (1 << 64) - 1
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53
