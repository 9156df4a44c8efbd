"""Draw the next token of every row at once, each row as if it were alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from redmux_server.engine.request import Request, Token

# Rows are cut by top-p among this many candidates first; a flatter row sorts its whole vocabulary.
_CANDIDATES = 1024


@dataclass(frozen=True, slots=True)
class NonFinite:
    """The row holds NaN or infinity: no token can be drawn from it."""


def sample(logits: Tensor, requests: Sequence[Request]) -> list[Token | NonFinite]:
    """Draws one token per row of `logits` [requests, vocab].

    Row i depends on row i and request i alone: the random number is a hash of the request's seed
    and the index of the token, so neither neighbours nor scheduling move it.
    """
    ids, is_finite = likeliest(logits)
    drawn = [i for i, r in enumerate(requests) if r.sampling.temperature > 0 and is_finite[i]]
    if drawn:
        for i, token_id in zip(drawn, _draw(logits[drawn], [requests[i] for i in drawn]),
                               strict=True):  # fmt: skip
            ids[i] = token_id
    tokens = [
        Token(token_id, None) if ok else NonFinite()
        for token_id, ok in zip(ids, is_finite, strict=True)
    ]
    asked = [i for i, r in enumerate(requests) if r.logprobs and is_finite[i]]
    if asked:
        told = _with_logprobs(
            logits[asked], [ids[i] for i in asked], [requests[i].num_top for i in asked]
        )
        for i, token in zip(asked, told, strict=True):
            tokens[i] = token
    return tokens


def _with_logprobs(logits: Tensor, ids: Sequence[int], num_top: Sequence[int]) -> list[Token]:
    # log_softmax works row by row, unlike logsumexp, which may split one long row over threads.
    logprobs = torch.log_softmax(logits.float(), -1)
    chosen = torch.tensor(ids, device=logits.device)[:, None]
    values = logprobs.gather(1, chosen)[:, 0].tolist()
    top = top_of(logits, logprobs, num_top)
    return [Token(*told) for told in zip(ids, values, top, strict=True)]


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
    plain = [i for i, p in enumerate(params) if not p.top_k and p.top_p >= 1]
    if plain:
        for i, index in zip(plain, _invert(probs[plain], point[plain]).tolist(), strict=True):
            ids[i] = index
    for i in sorted(set(range(len(params))) - set(plain)):
        order, kept = _truncate(probs[i], params[i].top_k, params[i].top_p)
        ids[i] = int(order[_invert(kept[None], point[i : i + 1])])
    return ids


def _truncate(probs: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Returns (token ids, probabilities) of the candidates, most likely first."""
    vocab = probs.shape[0]
    size = min(top_k or _CANDIDATES, vocab)
    values, order = probs.topk(size)
    reached = values.double().cumsum(0)
    if not top_k and reached[-1] < top_p:
        values, order = probs.sort(descending=True)
        reached = values.double().cumsum(0)
    # A token is kept while the mass before it is below top_p; of a top-k set, relative to its mass.
    limit = top_p * reached[-1] if top_k else torch.tensor(top_p, dtype=torch.float64)
    keep = int(((reached - values.double()) < limit).sum().clamp(min=1))
    return order[:keep], values[:keep]


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
