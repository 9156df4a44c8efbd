"""The methods of all services, over what a loaded server has."""

from collections.abc import Awaitable, Callable
from typing import Any

from redmux.v1 import admin_service_pb2, inference_service_pb2
from redmux.v1.adapter_service_pb2_grpc import add_AdapterServiceServicer_to_server
from redmux.v1.admin_service_pb2_grpc import add_AdminServiceServicer_to_server
from redmux.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server
from redmux.v1.training_service_pb2_grpc import add_TrainingServiceServicer_to_server
from redmux_server.grpc_api.adapters import AdapterServicer
from redmux_server.grpc_api.call_keys import CallKeys
from redmux_server.grpc_api.door import SERVICES
from redmux_server.grpc_api.servicers import AdminServicer, InferenceServicer
from redmux_server.grpc_api.training import TrainingServicer
from redmux_server.keys import ApiKeys
from redmux_server.registry.registry import AdapterRegistry
from redmux_server.training.service import TrainingService
from redmux_server.wiring import Services

_MESSAGE_BYTES = 4 << 20
_JOB_BYTES = 16 << 20  # of a training job's records
_CONFIG_BYTES = 1 << 20  # of what comes with an adapter's file


def add_methods(
    server: Any, keys: ApiKeys, services: Services, registry: AdapterRegistry,
    training: TrainingService, info: Callable[[str], Awaitable[admin_service_pb2.ServerInfo]],
    on_change: Callable[[], None],
) -> None:  # fmt: skip
    """Adds every method to what takes methods as a server of gRPC does.

    `info` is asked for every GetServerInfo, with the tenant; `on_change` is told of every change of
    adapters.
    """
    callers = CallKeys(keys)
    add_InferenceServiceServicer_to_server(
        InferenceServicer(
            services.generation, services.scoring, services.reading, services.tokens, callers
        ),
        server,
    )
    add_AdapterServiceServicer_to_server(AdapterServicer(registry, on_change, callers), server)
    add_AdminServiceServicer_to_server(AdminServicer(info, callers), server)
    add_TrainingServiceServicer_to_server(TrainingServicer(training, callers), server)


def message_limits(registry: AdapterRegistry, training: TrainingService) -> dict[str, int]:
    """Returns the most bytes of a request by method, of those that take data."""
    inference, adapters, _, jobs = SERVICES
    methods = inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"].methods
    limits = {f"/{inference}/{method.name}": _MESSAGE_BYTES for method in methods}
    limits[f"/{adapters}/PutAdapter"] = registry.max_file_bytes + _CONFIG_BYTES
    if training.trains:
        limits[f"/{jobs}/CreateJob"] = _JOB_BYTES
    return limits
