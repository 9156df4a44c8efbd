"""Log-probabilities of given tokens: rows of logits come in, a few numbers per row go out."""

import torch
from torch import Tensor

from redmux_server.engine.request import Scored, Work
from redmux_server.engine.sampling import NonFinite, likeliest, top_of

_ROWS = 32  # scored at a time: so many rows of the vocabulary are held a second time


def score(logits: Tensor, item: Work) -> Scored | NonFinite:
    """Scores the targets of a work item by their rows of `logits` [rows, vocab].

    Row by row, so that a request's numbers depend neither on neighbours nor on chunks.
    """
    request, scored = item.request, item.scored
    done = request.num_computed + scored.start - request.first_wanted
    targets = torch.tensor(request.targets[done : done + len(scored)], device=logits.device)
    logprobs: list[float] = []
    is_greedy: list[bool] = []
    top: list[list[tuple[int, float]]] = []
    for start in range(0, len(scored), _ROWS):
        rows, chosen = logits[start : start + _ROWS], targets[start : start + _ROWS]
        highest_ids, is_finite = likeliest(rows)
        if not all(is_finite):
            return NonFinite()
        values = torch.log_softmax(rows.float(), -1)
        logprobs += values.gather(1, chosen[:, None])[:, 0].tolist()
        if request.num_target_top:
            top += top_of(rows, values, [request.num_target_top] * len(rows))
        is_greedy += [a == b for a, b in zip(highest_ids, chosen.tolist(), strict=True)]
    return Scored(logprobs, is_greedy, top)
