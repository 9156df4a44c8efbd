"""What a server tells of itself: messages to values. No I/O, shared by both clients."""

from redmux.server_types import Health, ServerInfo
from redmux.v1 import admin_service_pb2


def server_info(message: admin_service_pb2.ServerInfo) -> ServerInfo:
    """Returns the value of a server's description."""
    fields = {name: getattr(message, name) for name in ServerInfo.__slots__}
    return ServerInfo(**{**fields, "choices": tuple(message.choices)})


# grpc.health.v1 in bytes. Its package would tie this SDK to one major version of protobuf, for a
# request of one string and a response of one enum.
HEALTH_METHOD = "/grpc.health.v1.Health/Check"
_SERVICE = b"redmux.v1.InferenceService"
HEALTH_REQUEST = b"\x0a" + bytes([len(_SERVICE)]) + _SERVICE  # string service = 1
_HEALTHS: dict[bytes, Health] = {b"\x08\x01": "serving", b"\x08\x02": "not_serving"}


def health(response: bytes) -> Health:
    """Returns the health that an encoded HealthCheckResponse tells."""
    return _HEALTHS.get(response, "unknown")
