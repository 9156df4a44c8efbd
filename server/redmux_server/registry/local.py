"""LocalAdapters: adapters that this server has beside its registry. No I/O."""

import bisect
import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterator

from redmux_server.registry.names import Reference
from redmux_server.registry.published import Published
from redmux_server.registry.tenants import OPERATOR, may_see, sees_all
from redmux_server.registry.unusable import Unusable


class LocalAdapters:
    """Given at start, or lying in a folder: by name, by digest, and in the order of names.

    Belongs to the event loop. They are not kept, and there is one version of each.
    """

    def __init__(self) -> None:
        self._by_name: dict[str, Published] = {}
        self._unusable: dict[str, Unusable] = {}
        self._by_digest: dict[str, dict[str, Published]] = {}  # digest -> name -> version
        self._names_of: dict[str, list[str]] = defaultdict(list)  # owner -> names, sorted

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[Published]:
        return iter(list(self._by_name.values()))

    def count(self, tenant: str) -> int:
        """Returns how many names a tenant sees."""
        return sum(map(len, self._visible(tenant)))

    def held(self, name: str) -> Published | Unusable | None:
        """Returns what a name stands for, whosever it is."""
        return self._by_name.get(name) or self._unusable.get(name)

    def find(self, reference: Reference, tenant: str) -> Published | None:
        """Returns what a tenant refers to, None where there is none that it sees.

        Raises what keeps the file of that name from being used.
        """
        if not (reference.name or reference.digest):
            return None
        if not reference.name:
            same = self._by_digest.get(reference.digest, {}).values()
            return next((found for found in same if may_see(tenant, found.owner)), None)
        unusable = self._unusable.get(reference.name)
        if unusable is not None and may_see(tenant, unusable.owner):
            raise unusable.fresh_error()
        found = self._by_name.get(reference.name)
        if found is None or reference.number or reference.alias:
            return None
        is_meant = may_see(tenant, found.owner) and found.digest.startswith(reference.digest)
        return found if is_meant else None

    def page(self, after: str, size: int, tenant: str) -> list[Published]:
        """Returns up to `size` adapters whose names sort after `after`."""
        starts = [(names, bisect.bisect_right(names, after)) for names in self._visible(tenant)]
        names = heapq.merge(*(names[start : start + size] for names, start in starts))
        return [self._by_name[name] for name in itertools.islice(names, size)]

    def neighbours(self, name: str, size: int, tenant: str) -> list[str]:
        """Returns about `size` names that a tenant sees, from around where a name would stand."""
        found: list[str] = []
        for names in self._visible(tenant):
            middle = bisect.bisect_left(names, name)
            found += names[max(0, middle - size // 4) : middle + size // 4]
        return found

    def add(self, item: Published | Unusable) -> None:
        """Has a name stand for this, in place of what it stood for."""
        self.discard(item.name)
        if isinstance(item, Unusable):
            self._unusable[item.name] = item
            return
        self._by_name[item.name] = item
        self._by_digest.setdefault(item.digest, {})[item.name] = item
        bisect.insort(self._names_of[item.owner], item.name)

    def discard(self, name: str) -> bool:
        """Takes a name back; returns whether it was there."""
        is_unusable = self._unusable.pop(name, None) is not None
        held = self._by_name.pop(name, None)
        if held is None:
            return is_unusable
        same = self._by_digest[held.digest]
        del same[name]
        if not same:
            del self._by_digest[held.digest]
        names = self._names_of[held.owner]
        del names[bisect.bisect_left(names, name)]
        if not names:
            del self._names_of[held.owner]
        return True

    def _visible(self, tenant: str) -> list[list[str]]:
        """Returns sorted lists that together are the names that a tenant sees."""
        owners = list(self._names_of) if sees_all(tenant) else [OPERATOR, tenant]
        return [self._names_of.get(owner, []) for owner in owners]
