"""StepCost: what a step of so many rows takes, learned from the steps themselves."""

_PRIOR_ROW = 0.04  # of a step without rows: less than on any machine measured, so it is tried
_LEAST_WEIGHT = 0.1  # of the newest step
_FORGETTING = 0.005  # of what was learned at other numbers of rows, with each step
_MOST_SURPRISE = 0.5  # of a step that something held up


class StepCost:
    """Seconds of a step by its rows, between powers of two in a straight line.

    Kept as factors of a guess, so that what was not tried yet follows from what was. What was not
    tried for long goes back to that, and so is tried again: the machine may have changed.
    """

    def __init__(self) -> None:
        self._factors = [0.0]  # by log2 of the rows
        self._num_seen = [0]

    def of(self, rows: int) -> float:
        """Returns the seconds of a step of so many rows, at least one; 1 before any was seen."""
        low = rows.bit_length() - 1
        part = rows / (1 << low) - 1
        factor = self._factor(low)
        if part:
            factor += part * (self._factor(low + 1) - factor)
        return _guess(rows) * factor

    def learn(self, rows: int, seconds: float) -> None:
        """Takes a step into account that computed one token, and its draft, for each request."""
        low = rows.bit_length() - 1
        while len(self._factors) < low + 2:
            self._factors.append(self._factors[-1])
            self._num_seen.append(0)
        found = seconds / _guess(rows)
        if not any(self._num_seen):
            self._factors = [found] * len(self._factors)
        for i in range(len(self._factors)):
            self._factors[i] += _FORGETTING * (found - self._factors[i])
        part = rows / (1 << low) - 1
        for i, share in ((low, 1 - part), (low + 1, part)):
            if not share:
                continue
            self._num_seen[i] += 1
            surprise = found / self._factors[i] - 1
            surprise = max(-_MOST_SURPRISE, min(_MOST_SURPRISE, surprise))
            weight = share * max(_LEAST_WEIGHT, 1 / self._num_seen[i])
            self._factors[i] *= 1 + weight * surprise

    def _factor(self, i: int) -> float:
        return self._factors[min(i, len(self._factors) - 1)] or 1.0


def _guess(rows: int) -> float:
    return 1 + _PRIOR_ROW * rows
