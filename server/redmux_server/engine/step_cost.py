"""StepCost: what a step of so many rows takes, learned from the steps themselves."""

_GUESSED_ROW = 0.04  # of a step without rows: less than on machines measured, so it is tried
_MEMORY = 0.99  # of what was learned, at each step
_NEIGHBOUR = 0.01  # weight of what was learned at twice or half as many rows
_MOST_SURPRISE = 1.5  # of a step that something held up, against those before it


class StepCost:
    """Seconds of a step by its rows, learned at powers of two, in straight lines between them.

    Kept as factors of a guess: what was not tried follows from its neighbours, and so does in time
    what was not tried for long. So a cost that was high in a bad minute is found out again.
    """

    def __init__(self) -> None:
        # By log2 of the rows: how much was learned there, and the sum of that.
        self._weights = [0.0, 0.0]
        self._sums = [0.0, 0.0]
        self._factors = [1.0, 1.0]

    def of(self, rows: int) -> float:
        """Returns the seconds of a step of so many rows, at least one; no seconds before any."""
        low = rows.bit_length() - 1
        last = len(self._factors) - 1
        if low >= last:
            return _guess(rows) * self._factors[last]
        part = rows / (1 << low) - 1
        below, above = self._factors[low : low + 2]
        return _guess(rows) * (below + part * (above - below))

    def learn(self, rows: int, seconds: float) -> None:
        """Takes in a step that computed one token, and its draft, for each of its requests."""
        low = rows.bit_length() - 1
        part = rows / (1 << low) - 1
        while len(self._factors) < low + 2:
            self._weights.append(0.0)
            self._sums.append(0.0)
            self._factors.append(0.0)
        found = seconds / _guess(rows)
        self._weights = [_MEMORY * weight for weight in self._weights]
        self._sums = [_MEMORY * total for total in self._sums]
        for i, share in ((low, 1 - part), (low + 1, part)):
            if self._weights[i] > 1:  # it has been seen before
                known = self._sums[i] / self._weights[i]
                found = min(max(found, known / _MOST_SURPRISE), known * _MOST_SURPRISE)
            self._weights[i] += share
            self._sums[i] += share * found
        self._spread()

    def _spread(self) -> None:
        """Lets all know what each has learned, the less the farther it is."""
        num = len(self._factors)
        weights, sums = [0.0] * num, [0.0] * num
        for order in (range(num), range(num - 1, -1, -1)):
            weight = total = 0.0
            for i in order:
                weight = _NEIGHBOUR * weight + self._weights[i]
                total = _NEIGHBOUR * total + self._sums[i]
                weights[i] += weight
                sums[i] += total
        self._factors = [total / weight for total, weight in zip(sums, weights, strict=True)]


def _guess(rows: int) -> float:
    return 1 + _GUESSED_ROW * rows
