"""The gRPC port: servicers, health and reflection over the services."""

import logging
from collections.abc import Callable
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from redmux.errors import FailedPreconditionError
from redmux.v1 import (
    adapter_service_pb2,
    admin_service_pb2,
    inference_service_pb2,
    training_service_pb2,
)
from redmux.v1.adapter_service_pb2_grpc import add_AdapterServiceServicer_to_server
from redmux.v1.admin_service_pb2_grpc import add_AdminServiceServicer_to_server
from redmux.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server
from redmux.v1.training_service_pb2_grpc import add_TrainingServiceServicer_to_server
from redmux_server.config import ServerConfig
from redmux_server.descriptors import max_connections
from redmux_server.grpc_api.interceptor import ApiKeys, Interceptor
from redmux_server.grpc_api.servicers import AdapterServicer, AdminServicer, InferenceServicer
from redmux_server.grpc_api.training import TrainingServicer
from redmux_server.registry.registry import AdapterRegistry
from redmux_server.training.service import TrainingService
from redmux_server.wiring import Services

logger = logging.getLogger(__name__)

_SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (inference_service_pb2, "InferenceService"),
        (adapter_service_pb2, "AdapterService"),
        (admin_service_pb2, "AdminService"),
        (training_service_pb2, "TrainingService"),
    )
)
_MESSAGE_BYTES = 4 << 20
_JOB_BYTES = 16 << 20  # of a training job's records
_CONFIG_BYTES = 1 << 20  # of what comes with an adapter's file


class GrpcDoor:
    """Offers the services over gRPC. `bind`, then `open`, at last `close`."""

    def __init__(
        self, config: ServerConfig, services: Services, registry: AdapterRegistry,
        training: TrainingService, info: Callable[[], admin_service_pb2.ServerInfo],
        on_change: Callable[[], None],
    ) -> None:  # fmt: skip
        """`info` is asked for every GetServerInfo; `on_change` is told of every change of adapters.

        Has to be called on the event loop that serves.
        """
        self._config = config
        keys = ApiKeys(config.api_keys, config.admin_key)
        interceptor = Interceptor(keys)
        limits = message_limits(registry, training)
        interceptor.set_limits(limits)
        self.health = HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[interceptor], options=_options(max(limits.values()))
        )
        add_InferenceServiceServicer_to_server(
            InferenceServicer(services.generation, services.scoring, services.reading, keys),
            self._server,
        )
        add_AdapterServiceServicer_to_server(
            AdapterServicer(registry, on_change, keys), self._server
        )
        add_AdminServiceServicer_to_server(AdminServicer(info), self._server)
        add_TrainingServiceServicer_to_server(TrainingServicer(training, keys), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        reflection.enable_server_reflection(
            (*_SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
             reflection.SERVICE_NAME), self._server,
        )  # fmt: skip

    def bind(self) -> int:
        """Returns the port that is taken; raises FailedPreconditionError where none can be."""
        config = self._config
        address = f"{config.host}:{config.port}"
        try:
            if config.tls_cert:
                pair = (Path(config.tls_key).read_bytes(), Path(config.tls_cert).read_bytes())
                port = self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
            else:
                port = self._server.add_insecure_port(address)
        except (RuntimeError, OSError) as err:
            raise FailedPreconditionError(f"cannot listen on {address}: {err}") from err
        is_local = config.host in ("127.0.0.1", "localhost", "::1", "[::1]")
        if not is_local and not (config.tls_cert and config.api_keys):
            logger.warning("%s is not a loopback address; set api_keys and tls_cert", config.host)
        return port

    async def open(self) -> None:
        """Starts to answer, as serving."""
        await self._server.start()
        await self.set_serving(True)

    async def set_serving(self, serving: bool) -> None:
        """Sets what health checks of the server and of each service are told."""
        status = health_pb2.HealthCheckResponse
        for name in ("", *_SERVICES):
            await self.health.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def close(self) -> None:
        """Ends what is still open after a second."""
        await self._server.stop(1.0)


def message_limits(registry: AdapterRegistry, training: TrainingService) -> dict[str, int]:
    """Returns the most bytes of a request by method, of those that take data."""
    inference, adapters, _, jobs = _SERVICES
    methods = inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"].methods
    limits = {f"/{inference}/{method.name}": _MESSAGE_BYTES for method in methods}
    limits[f"/{adapters}/PutAdapter"] = registry.max_file_bytes + _CONFIG_BYTES
    if training.trains:
        limits[f"/{jobs}/CreateJob"] = _JOB_BYTES
    return limits


def _options(message_bytes: int) -> list[tuple[str, int]]:
    """gRPC options: dead peers are found in a minute, floods are bounded, ports are not shared."""
    return [
        ("grpc.max_receive_message_length", message_bytes),
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
