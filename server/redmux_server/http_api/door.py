"""The HTTP port: it opens before torch and FastAPI, and tells that the server loads."""

import asyncio
import contextlib
import functools
import socket
import ssl
from collections.abc import Mapping

from uvicorn.config import Config
from uvicorn.server import ServerState

from redmux.errors import FailedPreconditionError
from redmux_server.config import ServerConfig
from redmux_server.descriptors import max_connections
from redmux_server.http_api.connection import Connection, Limits
from redmux_server.http_api.cors import Cors
from redmux_server.http_api.gate import App, Gate
from redmux_server.http_api.health import Health
from redmux_server.in_flight import InFlight
from redmux_server.keys import ApiKeys
from redmux_server.metrics_port import listen

_CLOSE_S = 1.0  # that requests get to end by themselves, and then to be told
_MOMENT_S = 0.02
_BACKLOG = 1024


class HttpDoor:
    """The port of HTTP: `bind` it, `open` it, `serve` once there is what to offer, then `close`."""

    def __init__(
        self, config: ServerConfig, keys: ApiKeys, in_flight: InFlight, health: Health,
        limits: Limits | None = None,
    ) -> None:  # fmt: skip
        """`in_flight` counts what all doors hold together."""
        self._config = config
        self._limits = limits or Limits(max_connections())
        self._gate = Gate(keys, in_flight, health, Cors(config.http_cors_origin))
        self._state = ServerState()
        self._socket: socket.socket | None = None

    def bind(self) -> int:
        """Returns the port that is taken, -1 where there shall be none.

        Raises FailedPreconditionError where it cannot be had.
        """
        config = self._config
        if config.http_port < 0:
            return -1
        try:
            self._socket = listen(config.host.strip("[]"), config.http_port)
            self._tls = _tls(config)
        except (OSError, ssl.SSLError) as err:
            if self._socket is not None:
                self._socket.close()
            raise FailedPreconditionError(
                f"cannot serve HTTP on {config.host}:{config.http_port}: {err}; set http_port to "
                "another port, 0 for a free one or -1 for none"
            ) from err
        port: int = self._socket.getsockname()[1]
        return port

    async def open(self) -> None:
        """Starts to answer, as not serving."""
        if self._socket is None:
            return
        config = Config(
            self._gate, interface="asgi3", http="httptools", ws="none", lifespan="off",
            log_config=None, access_log=False, proxy_headers=False, server_header=False,
            timeout_keep_alive=round(self._limits.idle_s),
        )  # fmt: skip
        config.load()
        self._server = await asyncio.get_running_loop().create_server(
            functools.partial(Connection, config, self._state, self._limits),
            sock=self._socket, ssl=self._tls, backlog=_BACKLOG,
        )  # fmt: skip

    def serve(self, app: App, limits: Mapping[str, int]) -> None:
        """Hands requests to `app`; `limits` are the most bytes of bodies by beginning of path."""
        self._gate.open(app, limits)

    async def close(self) -> None:
        """Takes no more requests, and ends as unavailable what is still open after a second."""
        if self._socket is None:
            return
        if not hasattr(self, "_server"):
            self._socket.close()
            return
        self._server.close()
        for connection in tuple(self._state.connections):
            connection.shutdown()
        await self._wait_for_answers()
        self._gate.is_closing = True
        for task in tuple(self._state.tasks):
            task.cancel()
        await self._wait_for_answers()
        for connection in tuple(self._state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # in which they are lost
        await self._server.wait_closed()

    async def _wait_for_answers(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                # uvicorn tells of no end of theirs.
                while self._state.tasks or self._state.connections:  # noqa: ASYNC110
                    await asyncio.sleep(_MOMENT_S)


def _tls(config: ServerConfig) -> ssl.SSLContext | None:
    if not config.tls_cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(config.tls_cert, config.tls_key)
    return context
