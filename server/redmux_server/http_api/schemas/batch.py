"""The body of /v1/batches."""

from typing import ClassVar

from redmux_server.http_api.errors import Refusal
from redmux_server.http_api.schemas.body import Body, Unserved
from redmux_server.http_api.schemas.metadata import Metadata

_HOUR_S = 3600
_MOST_HOURS = 168


class BatchBody(Body):
    """A file of requests, to be answered within a time."""

    unserved: ClassVar[Unserved] = {
        "output_expires_after": ((), "files stay until they are deleted"),
    }
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: Metadata | None = None

    def window_s(self) -> float:
        """Returns the time in seconds; raises for what is none."""
        number = self.completion_window.removesuffix("h")
        is_hours = number != self.completion_window and number.isascii() and number.isdecimal()
        if not is_hours or len(number) > 3 or not 1 <= int(number) <= _MOST_HOURS:
            raise Refusal(
                f"completion_window is {self.completion_window[:80]!r}, must be hours such as "
                f"'24h', up to '{_MOST_HOURS}h'",
                param="completion_window",
            )
        return float(int(number) * _HOUR_S)
