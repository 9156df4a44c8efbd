"""Quarantine: an adapter whose requests all fail is not computed again and again."""

import logging

from redmux.errors import FailedPreconditionError

logger = logging.getLogger(__name__)

_MOST_FAILURES = 3  # requests in a row
_MOST_DIGESTS = 4096  # that are remembered, the latest


class Quarantine:
    """Counts of each adapter the requests in a row that met a value that is not finite.

    A request that ends well forgives all before it, so that what only some prompts bring about
    keeps nobody from the others. It is about content: other content under the same name starts
    anew. The engine thread writes, anyone reads.
    """

    def __init__(self) -> None:
        self._failures: dict[str, int] = {}  # digest -> requests in a row

    def failed(self, digest: str) -> None:
        """Counts a request of this adapter that met such a value."""
        count = self._failures.pop(digest, 0) + 1
        self._failures[digest] = count
        if count == _MOST_FAILURES:
            logger.warning("adapter %s is refused from now on: it was not finite %d times in a row",
                           digest, count)  # fmt: skip
        while len(self._failures) > _MOST_DIGESTS:
            del self._failures[next(iter(self._failures))]

    def passed(self, digest: str) -> None:
        """Takes in that a request of this adapter ended well."""
        self._failures.pop(digest, None)

    def check(self, digest: str) -> None:
        """Raises FailedPreconditionError for an adapter that is not computed any more."""
        if self._failures.get(digest, 0) >= _MOST_FAILURES:
            raise FailedPreconditionError(
                f"{digest} has produced values that are not finite in {_MOST_FAILURES} requests in "
                "a row and is not computed any more; put an adapter of smaller values in its place"
            )
