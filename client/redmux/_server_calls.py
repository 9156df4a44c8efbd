"""What a server tells of itself: messages to values. No I/O, shared by both clients."""

from redmux.server_types import Health, Latencies, Load, ServerInfo
from redmux.v1 import admin_service_pb2


def server_info(message: admin_service_pb2.ServerInfo) -> ServerInfo:
    """Returns the value of a server's description."""
    fields = {name: getattr(message, name) for name in ServerInfo.__slots__}
    fields["choices"] = tuple(message.choices)
    fields["load"] = _load(message.load) if message.HasField("load") else None
    return ServerInfo(**fields)


def _load(message: admin_service_pb2.Load) -> Load:
    fields = {name: getattr(message, name) for name in Load.__slots__}
    for name in ("first_token", "between_tokens", "whole_request"):
        fields[name] = _latencies(fields[name])
    return Load(**fields)


def _latencies(message: admin_service_pb2.Latencies) -> Latencies:
    return Latencies(tuple(message.limits_s), tuple(message.counts), message.sum_s)


# grpc.health.v1 in bytes. Its package would tie this SDK to one major version of protobuf, for a
# request of one string and a response of one enum.
HEALTH_METHOD = "/grpc.health.v1.Health/Check"
_SERVICE = b"redmux.v1.InferenceService"
HEALTH_REQUEST = b"\x0a" + bytes([len(_SERVICE)]) + _SERVICE  # string service = 1
_HEALTHS: dict[bytes, Health] = {b"\x08\x01": "serving", b"\x08\x02": "not_serving"}


def health(response: bytes) -> Health:
    """Returns the health that an encoded HealthCheckResponse tells."""
    return _HEALTHS.get(response, "unknown")
