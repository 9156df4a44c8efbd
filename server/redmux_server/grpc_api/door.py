"""The gRPC port with its health and reflection, without the methods: it opens before torch."""

import asyncio
import logging
import ssl
from collections.abc import Mapping
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from redmux.errors import FailedPreconditionError, InvalidArgumentError
from redmux.v1 import (
    adapter_service_pb2,
    admin_service_pb2,
    inference_service_pb2,
    training_service_pb2,
)
from redmux_server.config import ServerConfig
from redmux_server.descriptors import max_connections
from redmux_server.grpc_api.ending import Ending
from redmux_server.grpc_api.interceptor import Interceptor
from redmux_server.grpc_api.loading import LateMethods
from redmux_server.grpc_api.refusals import Refusals
from redmux_server.in_flight import InFlight
from redmux_server.keys import ApiKeys

logger = logging.getLogger(__name__)

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (inference_service_pb2, "InferenceService"),
        (adapter_service_pb2, "AdapterService"),
        (admin_service_pb2, "AdminService"),
        (training_service_pb2, "TrainingService"),
    )
)
_CLOSE_S = 1.0  # that calls get to end by themselves
_MESSAGE_BYTES = 16 << 20  # of a reply, the most that a client takes
# Of any message, before the model is known and with it the size of its adapters.
_LARGEST_BYTES = 64 << 20


class GrpcDoor:
    """The port of gRPC: `bind` it, `open` it, `serve` once there is what to offer, then `close`.

    In between health is NOT_SERVING and every method UNAVAILABLE. Has to be made on the event
    loop that serves.
    """

    def __init__(
        self, config: ServerConfig, keys: ApiKeys, in_flight: InFlight, refusals: Refusals
    ) -> None:
        """`in_flight` counts what all doors hold together."""
        self._config = config
        self._interceptor = Interceptor(keys, in_flight, refusals=refusals)
        self.health = HealthServicer()
        self._ending = Ending()
        self.methods = LateMethods()
        self._server = grpc.aio.server(
            interceptors=[self._ending, self._interceptor], options=_options()
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        reflection.enable_server_reflection(
            (*SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
             reflection.SERVICE_NAME), self._server,
        )  # fmt: skip
        self._server.add_generic_rpc_handlers((self.methods,))

    def bind(self) -> int:
        """Returns the port that is taken.

        Raises FailedPreconditionError where none can be, InvalidArgumentError for a certificate
        that cannot be used.
        """
        config = self._config
        host = config.host.strip("[]")
        address = f"[{host}]:{config.port}" if ":" in host else f"{host}:{config.port}"
        pair = _certificate(config) if config.tls_cert else None
        try:
            if pair is not None:
                port = self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
            else:
                port = self._server.add_insecure_port(address)
            if config.socket:
                address = f"unix:{config.socket}"
                self._server.add_insecure_port(address)
        except RuntimeError as err:  # gRPC's own, which names a variable for the reason
            raise FailedPreconditionError(
                f"cannot listen on {address}; is it taken by another server, or not an address of "
                "this machine? --host, --port and --socket choose others"
            ) from err
        if not config.is_local and not config.tls_cert:
            logger.warning(
                "%s is not a loopback address; without tls_cert others can read along", config.host
            )
        return port

    async def open(self) -> None:
        """Starts to answer, as not serving."""
        await self.set_serving(False)
        await self._server.start()

    async def serve(self, limits: Mapping[str, int]) -> None:
        """Offers the methods that were added; `limits` are the most bytes of their requests."""
        self._interceptor.set_limits(limits)
        self.methods.open()
        await self.set_serving(True)

    async def set_serving(self, serving: bool) -> None:
        """Sets what health checks of the server and of each service are told."""
        status = health_pb2.HealthCheckResponse
        for name in ("", *SERVICES):
            await self.health.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def close(self) -> None:
        """Takes no more calls, and ends as unavailable what is still open after a second."""
        await self._ending.refuse_calls()
        stopping = asyncio.ensure_future(self._server.stop(2 * _CLOSE_S))
        await asyncio.wait([stopping], timeout=_CLOSE_S)
        self._ending.end_calls()
        await stopping


def _certificate(config: ServerConfig) -> tuple[bytes, bytes]:
    """Returns private key and certificates; raises InvalidArgumentError unless they are a pair."""
    files = f"tls_cert {config.tls_cert} and tls_key {config.tls_key}"
    try:
        # gRPC would only say that it cannot bind.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(config.tls_cert, config.tls_key, password=lambda: b"")
        return Path(config.tls_key).read_bytes(), Path(config.tls_cert).read_bytes()
    except ssl.SSLError as err:
        reason = err.reason or "not PEM"
        raise InvalidArgumentError(
            f"{files} are no certificate and its private key, unencrypted and in PEM: {reason}"
        ) from None
    except OSError as err:
        raise InvalidArgumentError(f"cannot read {files}: {err.strerror}") from None


def _options() -> list[tuple[str, int]]:
    """gRPC options: dead peers are found in a minute, floods are bounded, ports are not shared."""
    return [
        ("grpc.max_receive_message_length", _LARGEST_BYTES),
        ("grpc.max_send_message_length", _MESSAGE_BYTES),
        # A request that nobody reads yet then takes 64 KiB at most: with probing, the window grows
        # to megabytes. One that is read opens the window to its own size.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.max_concurrent_streams", 1024),
        ("grpc.max_allowed_incoming_connections", max_connections()),
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.max_connection_idle_ms", 300_000),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # Without this one a dead peer is noticed a minute late (undocumented, grpcio 1.85).
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.so_reuseport", 0),
        ("grpc.enable_channelz", 0),
    ]
