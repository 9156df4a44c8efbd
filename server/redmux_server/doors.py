"""All ports of a server: open from its start, so that it can tell that it loads."""

import asyncio
import logging
from collections.abc import Callable

from redmux.errors import FailedPreconditionError, InvalidArgumentError
from redmux_server.config import ServerConfig
from redmux_server.grpc_api.door import GrpcDoor
from redmux_server.grpc_api.refusals import Refusals
from redmux_server.http_api.door import HttpDoor
from redmux_server.http_api.health import Health
from redmux_server.in_flight import InFlight
from redmux_server.keys import ApiKeys, read_keys
from redmux_server.metrics import Metrics
from redmux_server.metrics_port import Exposition, MetricsPort, State

logger = logging.getLogger(__name__)


class Doors:
    """gRPC, HTTP and metrics, open; health is NOT_SERVING until the gRPC door is told to serve."""

    def __init__(self, config: ServerConfig, keys: ApiKeys) -> None:
        self._config = config
        self.keys = keys
        self.metrics = Metrics()
        # What the metrics port tells of the server; its owner sets another one.
        self.state: Callable[[], State] = lambda: State.LOADING
        exposition = Exposition(self.metrics.registry)
        self._metrics = MetricsPort(exposition, lambda: self.state())
        in_flight = InFlight()
        self.grpc = GrpcDoor(config, keys, in_flight, Refusals(self.metrics.refused))
        self.health = Health(lambda: self.state(), exposition)
        self.http = HttpDoor(config, keys, in_flight, self.health)
        self.port = 0
        self.http_port = -1
        self.metrics_port = 0

    @classmethod
    async def open(cls, config: ServerConfig) -> "Doors":
        """Returns the doors of a server, which answer from here on, on the loop that runs.

        Raises InvalidArgumentError or FailedPreconditionError for a key file, a port or a
        certificate that cannot be had.
        """
        doors = cls(config, ApiKeys(read_keys(config), config.admin_key))
        doors.port = doors.grpc.bind()
        try:
            doors.http_port = doors.http.bind()
            await doors._metrics.open(config.host, config.metrics_port)
        except FailedPreconditionError:
            await asyncio.gather(doors.grpc.close(), doors.http.close())
            raise
        doors.metrics_port = doors._metrics.port
        await doors.grpc.open()
        await doors.http.open()
        return doors

    async def close(self) -> None:
        """Ends what is still open after a second and frees the ports."""
        await asyncio.gather(self.grpc.close(), self.http.close())
        await self._metrics.close()

    def read_keys_again(self) -> None:
        """Lets in the keys that the key file holds now; one that cannot be used changes nothing."""
        try:
            keys = read_keys(self._config)
        except InvalidArgumentError as err:
            logger.error("the API keys stay as they are: %s", err)
            return
        self.keys.set(keys)
        logger.info("API keys read again: %d are let in", len(keys))
