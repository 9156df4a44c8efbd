"""Health: /health, /ready, /version and /metrics, which answer before the model is loaded."""

from collections.abc import Callable

import redmux
from redmux_server.metrics_port import Exposition, State

_JSON = "application/json"


class Health:
    """What probes and scrapers are told, on the event loop that serves."""

    def __init__(self, state: Callable[[], State], metrics: Exposition) -> None:
        """`state` is asked at every request."""
        self._state = state
        self._metrics = metrics

    def answer(self, path: str, accept: bytes) -> tuple[int, str, bytes] | None:
        """Returns status, content type and body; None for any other path."""
        if path == "/metrics":
            return 200, *self._metrics.text(accept.decode("latin-1"))
        if path == "/version":
            return 200, _JSON, b'{"version":"%s"}' % redmux.__version__.encode()
        state = self._state()
        if path == "/health":
            is_well = state.is_healthy
        elif path == "/ready":
            is_well = state is State.SERVING
        else:
            return None
        return 200 if is_well else 503, _JSON, b'{"status":"%s"}' % state.value.encode()
