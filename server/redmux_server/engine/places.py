"""Places: how many requests are open, of whom, and who may open another."""

from collections import Counter
from collections.abc import Sequence

from redmux.errors import ResourceExhaustedError
from redmux_server.engine.request import Request

_RESERVE = 8  # one place of so many is kept for others
_RETRY_AFTER_S = 0.5


class Places:
    """The places of requests that wait or run, shared by tenants.

    A tenant may hold seven eighths of the places that the others leave, rounded down, but one at
    least: alone nearly all of them, and whoever comes second finds a place. Who holds more than
    that, since others have come, gets no new ones, so with time all come to hold about the same.
    """

    def __init__(self, num_places: int) -> None:
        self.num_places = num_places
        self._held: Counter[str] = Counter()

    @property
    def most_for_one(self) -> int:
        """How many places a tenant may hold that is alone."""
        return _share(self.num_places)

    def has_place(self, tenant: str) -> bool:
        """Whether this tenant may open a request now."""
        return self._held[tenant] < _share(self.num_places - self._num_others(tenant))

    def take(self, requests: Sequence[Request]) -> None:
        """Gives requests of one tenant their places, all or none.

        Raises ResourceExhaustedError, which says whose requests fill the places.
        """
        tenant = requests[0].tenant
        held, others = self._held[tenant], self._num_others(tenant)
        share = _share(self.num_places - others)
        if held + len(requests) > share:
            most = max((n for other, n in self._held.items() if other != tenant), default=0)
            if held + len(requests) > most:
                full = (
                    f"the share of this API key (without keys: of this adapter) is full: {held} "
                    f"requests of it are open beside {others} of others, and {share} of "
                    f"{self.num_places} places are its share then"
                )
            else:
                full = f"requests of others fill the queue: {others} of {self.num_places} places"
            raise ResourceExhaustedError(
                f"{full}; try again in {_RETRY_AFTER_S} s", retry_after_s=_RETRY_AFTER_S
            )
        self._held[tenant] += len(requests)

    def give_back(self, request: Request) -> None:
        """Takes the place of a request back that has ended."""
        self._held[request.tenant] -= 1
        if not self._held[request.tenant]:
            del self._held[request.tenant]

    def _num_others(self, tenant: str) -> int:
        return self._held.total() - self._held[tenant]


def _share(num_left: int) -> int:
    """Returns how many places a tenant may hold of those that the others leave."""
    return max(min(1, num_left), num_left - -(-num_left // _RESERVE))
