"""Which tokens of a distribution may be drawn: top_k, top_p, min_p and typical_p."""

import torch
from torch import Tensor

from redmux_server.engine.request import SamplingParams

# Rows are cut among this many candidates first; a flatter row sorts its whole vocabulary.
_CANDIDATES = 1024


def candidates(probs: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Returns (token ids, probabilities) of the tokens of a row [vocab] that may be drawn.

    Each of top_k, top_p and min_p keeps some of the likeliest, so the strictest of them decides;
    typical_p takes what is left for the whole distribution.
    """
    if params.top_k or params.top_p < 1:
        order, values = _likeliest(probs, params)
    elif params.min_p:
        order = (probs >= params.min_p * probs.max()).nonzero()[:, 0]
        values = probs[order]
    else:
        order, values = torch.arange(len(probs), device=probs.device), probs
    if params.typical_p < 1:
        typical = _typical(values.double(), params.typical_p)
        order, values = order[typical], values[typical]
    return order, values


def _likeliest(probs: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    top_k, top_p = params.top_k, params.top_p
    values, order = probs.topk(min(top_k or _CANDIDATES, len(probs)))
    if top_k and values[-1] > 0:  # what is not likely at all may be left out
        order = _with_ties(probs, order)
        values = probs[order]
    reached = values.double().cumsum(0)
    lowest = params.min_p * values[0]
    if not top_k and reached[-1] < top_p and values[-1] >= lowest:
        values, order = probs.sort(descending=True)
        reached = values.double().cumsum(0)
    keep = int((values >= lowest).sum())
    if top_p < 1:
        # A token is kept while the mass before it is below top_p; of a top-k set, relative to its
        # mass.
        limit = top_p * reached[-1] if top_k else torch.tensor(top_p, dtype=torch.float64)
        keep = min(keep, int(((reached - values.double()) < limit).sum().clamp(min=1)))
    return order[:keep], values[:keep]


def _with_ties(probs: Tensor, order: Tensor) -> Tensor:
    """Returns the likeliest tokens, in this order, and all that are as likely as their last."""
    last = probs[order[-1]]
    return torch.cat([order[probs[order] > last], (probs == last).nonzero()[:, 0]])


def _typical(probs: Tensor, mass: float) -> Tensor:
    """Returns which of these tokens say about as much as the distribution does on average.

    Those with the least distance between surprise and entropy, until they reach the mass: Meister
    et al. 2023, as transformers has it. Tokens of one distance stay or go together.
    """
    probs = probs / probs.sum()
    surprise = -probs.log()
    distance = (surprise - (probs * surprise).nansum()).abs()
    for size in (min(_CANDIDATES, len(probs)), len(probs)):
        nearest, order = distance.topk(size, largest=False)
        reached = probs[order].cumsum(0)
        if reached[-1] >= mass:
            break
    last = int((reached < mass).sum().clamp(max=len(reached) - 1))
    return distance <= nearest[last]
