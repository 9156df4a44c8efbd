"""RecentVersions: the versions that somebody holds, and those that were used last."""

from collections import OrderedDict
from collections.abc import Iterator
from weakref import WeakValueDictionary

from redmux_server.registry.published import Published

_MOST = 1024  # a few kilobytes each


class RecentVersions:
    """Versions by their id in the registry: one object of each, for as long as somebody has it.

    Belongs to the event loop, but for `live`.
    """

    def __init__(self) -> None:
        self._live: WeakValueDictionary[int, Published] = WeakValueDictionary()
        self._recent: OrderedDict[int, Published] = OrderedDict()  # least recent first

    def get(self, version_id: int) -> Published | None:
        """Returns a version if it is at hand."""
        published = self._live.get(version_id)
        if published is not None:
            self.add(version_id, published)
        return published

    def add(self, version_id: int, published: Published) -> None:
        """Keeps a version as the most recently used one."""
        self._live[version_id] = published
        self._recent[version_id] = published
        self._recent.move_to_end(version_id)
        if len(self._recent) > _MOST:
            self._recent.popitem(last=False)

    def live(self, version_id: int) -> Published | None:
        """Returns a version that somebody may hold; from any thread."""
        return self._live.get(version_id)

    def forget(self, version_id: int) -> None:
        """Leaves a version to those who hold it."""
        self._recent.pop(version_id, None)

    def __iter__(self) -> Iterator[Published]:
        return iter(list(self._recent.values()))
