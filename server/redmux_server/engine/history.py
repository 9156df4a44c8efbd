"""History: what a request has said so far, kept so that a step costs what it adds."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


class History:
    """The tokens of a request, which of them there are, and how often among its output."""

    def __init__(self, prompt_ids: Sequence[int], room: int) -> None:
        """`room` is for how many tokens there has to be place, the prompt's included."""
        self._num_prompt = len(prompt_ids)
        self._num_tokens = len(prompt_ids)
        self._tokens = np.zeros(room, np.int64)
        self._tokens[: self._num_prompt] = prompt_ids
        known = np.unique(self._tokens[: self._num_prompt])
        self._num_known = len(known)
        self._known = np.zeros(room, np.int64)
        self._known[: self._num_known] = known
        self._counts = np.zeros(room, np.float32)
        self._places = {token_id: place for place, token_id in enumerate(known.tolist())}

    def extend(self, token_ids: Sequence[int]) -> None:
        """Adds those of a request's tokens, prompt and output, that came since the last call."""
        for token_id in token_ids[self._num_tokens :]:
            self._tokens[self._num_tokens] = token_id
            self._num_tokens += 1
            place = self._places.setdefault(token_id, self._num_known)
            self._known[place] = token_id
            self._counts[place] += 1
            self._num_known = len(self._places)

    @property
    def known(self) -> Ids:
        """Every token that occurs, once."""
        return self._known[: self._num_known]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """Of each known token how often it occurs in the output."""
        return self._counts[: self._num_known]

    def would_repeat(self, length: int) -> Ids:
        """Returns the tokens that would make the end an n-gram of this length that was there."""
        tokens = self._tokens[: self._num_tokens]
        if length == 1:
            return self.known
        if len(tokens) < length:
            return tokens[:0]
        # Ends of what is as long as the n-gram but for its last token; that token follows.
        ends = length - 2 + np.flatnonzero(tokens[length - 2 : -1] == tokens[-1])
        for back in range(1, length - 1):
            ends = ends[tokens[ends - back] == tokens[-1 - back]]
        return tokens[ends + 1]

    def would_complete(self, sequence: Sequence[int]) -> bool:
        """Whether the output ends with this sequence but for its last token."""
        length = len(sequence) - 1
        if self._num_tokens - self._num_prompt < length:
            return False
        end = self._tokens[self._num_tokens - length : self._num_tokens]
        return bool((end == sequence[:-1]).all())
