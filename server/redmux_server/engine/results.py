"""What the rows of logits of a step come to."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from redmux_server.engine.grammar import Bar
from redmux_server.engine.request import Read, Request, Scored, Token, Work
from redmux_server.engine.sampling import Exhausted, NonFinite, sample
from redmux_server.engine.scoring import score

Result = Token | Scored | Read | NonFinite | Exhausted  # what a step comes to for a request


@dataclass(frozen=True, slots=True)
class Drafted:
    """The draft of a request, and the logits [drafted tokens, vocab] behind each of its tokens."""

    request: Request
    draft: Sequence[int]
    rows: Tensor

    def holds(self, depth: int) -> bool:
        """Whether the request goes on, and what it drew last is this token of the draft."""
        goes_on = bool(self.request.blocks) and depth < len(self.draft)
        return goes_on and self.request.token_ids[-1] == self.draft[depth]


def evaluate(
    logits: Tensor, work: Sequence[Work], bar: Bar
) -> tuple[dict[Work, list[tuple[Request, Result]]], list[Drafted]]:
    """Returns what the wanted rows of each work item come to, of those that want any.

    From the row of a request that has followers each of these draws, too. Beside that come the
    rows of drafts, from which nothing is drawn yet.
    """
    results: dict[Work, list[tuple[Request, Result]]] = {}
    drawing: list[Work] = []
    drawers: list[Request] = []
    rows: list[int] = []  # of the logits, one for each drawer
    drafted: list[Drafted] = []
    row = 0
    for item in work:
        num_scored = len(item.scored)
        if num_scored:
            scored = score(logits[row : row + num_scored], item)
            results[item] = [(item.request, scored)]
        row += len(item.wanted)
        if item.samples and not (num_scored and isinstance(scored, NonFinite)):
            requests = [item.request, *item.request.followers]
            drawers += requests
            drawing += [item] * len(requests)
            behind = row - len(item.draft)
            rows += [behind - 1] * len(requests)
            if item.draft:
                drafted.append(Drafted(item.request, item.draft, logits[behind:row]))
    if drawing:
        drawn_logits = logits if rows == list(range(len(logits))) else logits[rows]
        tokens = sample(drawn_logits, drawers, bar)
        for item, request, token in zip(drawing, drawers, tokens, strict=True):
            results.setdefault(item, [])
            if request is item.request or not isinstance(token, NonFinite):
                results[item].append((request, token))
    return results, drafted
