"""Log-probabilities of given tokens: rows of logits come in, two numbers per row go out."""

import torch
from torch import Tensor

from redmux_server.engine.request import Scored, Work
from redmux_server.engine.sampling import NonFinite, likeliest

_ROWS = 32  # scored at a time: so many rows of the vocabulary are held a second time


def score(logits: Tensor, item: Work) -> Scored | NonFinite:
    """Scores the targets of a work item by its wanted rows of `logits` [rows, vocab].

    Row by row, so that a request's numbers depend neither on neighbours nor on chunks.
    """
    request, wanted = item.request, item.wanted
    done = request.num_computed + wanted.start - request.first_wanted
    targets = torch.tensor(request.targets[done : done + len(wanted)], device=logits.device)
    logprobs: list[float] = []
    is_greedy: list[bool] = []
    for start in range(0, len(wanted), _ROWS):
        rows, chosen = logits[start : start + _ROWS], targets[start : start + _ROWS]
        highest_ids, is_finite = likeliest(rows)
        if not all(is_finite):
            return NonFinite()
        values = torch.log_softmax(rows.float(), -1).gather(1, chosen[:, None])
        logprobs += values[:, 0].tolist()
        is_greedy += [a == b for a, b in zip(highest_ids, chosen.tolist(), strict=True)]
    return Scored(logprobs, is_greedy)
