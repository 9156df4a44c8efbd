"""Cors: which pages of other origins a browser lets use the server."""

from collections.abc import Mapping, Sequence

_METHODS = b"GET, POST, PUT, DELETE, OPTIONS"
_EXPOSED = b"x-request-id, x-redmux-adapter, retry-after, retry-after-ms"
_MAX_AGE_S = b"600"


class Cors:
    """Allows the pages of some origins, given as browsers write them; "*" allows all."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._origins = frozenset(origin.encode() for origin in origins)
        self.preflight = [
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-allow-headers", b"*, authorization"),
            (b"access-control-max-age", _MAX_AGE_S),
        ]

    def headers(self, origin: bytes) -> list[tuple[bytes, bytes]]:
        """Returns what to add to an answer; nothing for an origin that is not allowed."""
        if not origin or not (origin in self._origins or b"*" in self._origins):
            return []
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", _EXPOSED),
            (b"vary", b"origin"),
        ]

    @staticmethod
    def is_preflight(method: str, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a browser only asks what it may do."""
        return method == "OPTIONS" and b"access-control-request-method" in headers
