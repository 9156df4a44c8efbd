"""Catalogue: which versions are published under which names, and who sees them. No I/O."""

import bisect
import heapq
import itertools
from collections import defaultdict

from redmux._nearest import nearest
from redmux.errors import NotFoundError
from redmux_server.registry.published import Published
from redmux_server.registry.tenants import OPERATOR, may_see, sees_all

_NEIGHBOURS = 16


class Catalogue:
    """Versions by name, by digest, and in the order of names. Belongs to the event loop.

    What a tenant does not see is to it as if it were not there; see `tenants`.
    """

    def __init__(self) -> None:
        self._by_name: dict[str, Published] = {}
        self._by_digest: dict[str, dict[str, Published]] = {}  # digest -> name -> version
        self._names: list[str] = []  # sorted
        self._names_of: dict[str, list[str]] = defaultdict(list)  # owner -> names, sorted

    def __len__(self) -> int:
        return len(self._by_name)

    def count(self, tenant: str) -> int:
        """Returns how many names a tenant sees."""
        return sum(map(len, self._visible(tenant)))

    def held(self, name: str) -> Published | None:
        """Returns what a name stands for, whosever it is."""
        return self._by_name.get(name)

    def resolve(self, name_or_digest: str, tenant: str) -> Published:
        """Returns the version of a name or of a digest; raises NotFoundError.

        Of several names with that digest, the one that has had it longest.
        """
        found = self._by_name.get(name_or_digest)
        if found is not None and may_see(tenant, found.owner):
            return found
        for found in self._by_digest.get(name_or_digest, {}).values():
            if may_see(tenant, found.owner):
                return found
        raise self.not_found(name_or_digest, tenant)

    def names_of(self, digest: str, owner: str) -> list[str]:
        """Returns the names that an owner has for a digest."""
        same = self._by_digest.get(digest, {})
        return [name for name, published in same.items() if published.owner == owner]

    def page(self, after: str, size: int, tenant: str) -> list[Published]:
        """Returns up to `size` versions whose names sort after `after`."""
        starts = [(names, bisect.bisect_right(names, after)) for names in self._visible(tenant)]
        names = heapq.merge(*(names[start : start + size] for names, start in starts))
        return [self._by_name[name] for name in itertools.islice(names, size)]

    def add(self, published: Published) -> None:
        """Publishes a version, in place of what its name stood for."""
        held = self._by_name.get(published.name)
        if held is not None:
            self.discard(held)
        self._by_name[published.name] = published
        self._by_digest.setdefault(published.digest, {})[published.name] = published
        for names in (self._names, self._names_of[published.owner]):
            bisect.insort(names, published.name)

    def discard(self, held: Published) -> None:
        """Takes a version back."""
        del self._by_name[held.name]
        same = self._by_digest[held.digest]
        del same[held.name]
        if not same:
            del self._by_digest[held.digest]
        for names in (self._names, self._names_of[held.owner]):
            del names[bisect.bisect_left(names, held.name)]
        if not self._names_of[held.owner]:
            del self._names_of[held.owner]

    def versions(self) -> list[Published]:
        """Returns everything that is published."""
        return list(self._by_name.values())

    def not_found(self, name: str, tenant: str) -> NotFoundError:
        """Returns the error for a name that a tenant does not see, with a near one that it sees."""
        name = name[:128]
        visible = self._visible(tenant)
        # Only neighbours in the order of names are compared, half of them before.
        neighbours: list[str] = []
        for names in visible:
            middle, count = bisect.bisect_left(names, name), _NEIGHBOURS // (2 * len(visible))
            neighbours += names[max(0, middle - count) : middle + count]
        near = nearest(name, neighbours)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return NotFoundError(
            f"no adapter {name!r}; {hint}{self.count(tenant)} loaded, see ListAdapters"
        )

    def _visible(self, tenant: str) -> list[list[str]]:
        """Returns sorted lists that together are the names that a tenant sees."""
        if sees_all(tenant):
            return [self._names]
        return [self._names_of.get(owner, []) for owner in (OPERATOR, tenant)]
