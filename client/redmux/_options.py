"""Options of gRPC's channels: retries, reconnection, keepalive, and who gets the calls."""

import json
from typing import Any

_SERVICES = ("InferenceService", "AdapterService", "AdminService", "TrainingService")

_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.enable_retries", 1),
    # The server accepts a ping every 20 s; idle channels send none.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # The limit that a keepalive ping really has, 60 s by default. With it, a stream from a server
    # that fell silent ends 40 s later.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    # Despite its name the time that an attempt to connect may take.
    ("grpc.min_reconnect_backoff_ms", 5_000),
)
# A server that restarts is found again soon; the defaults take minutes. Not before a call that
# meets nobody has failed for good, or its error would be that of another address of the name.
_ALONE = (("grpc.initial_reconnect_backoff_ms", 1_500), ("grpc.max_reconnect_backoff_ms", 1_500))
# One of several has to be known again while calls that the next one refused are tried again: so
# a rolling restart loses none.
_SHARED = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 400))


def channel_options(*, is_shared: bool) -> tuple[tuple[str, int | str], ...]:
    """Returns the options of a channel to one server, or to several that share the calls."""
    config = _service_config("0.2s" if is_shared else "0.1s")
    if is_shared:
        # Calls go in turn to those whose health, which is watched, is serving: a server that
        # drains or loads is left out before it has to refuse anything.
        config |= {
            "loadBalancingConfig": [{"round_robin": {}}],
            "healthCheckConfig": {"serviceName": ""},
        }
    backoff = _SHARED if is_shared else _ALONE
    return (*_OPTIONS, *backoff, ("grpc.service_config", json.dumps(config)))


def _service_config(first_backoff: str) -> dict[str, Any]:
    """Returns how calls are tried again.

    gRPC itself does, with backoff and within the deadline, and never once the server has begun to
    answer. All calls may run twice: a generation leaves no trace, putting the same content again
    changes nothing, a second delete finds nothing left to do, and a job is made once per
    request_id.
    """
    return {
        "methodConfig": [
            {
                "name": [{"service": f"redmux.v1.{service}"} for service in _SERVICES],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": first_backoff,
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    # gRPC's servers cancel calls that come while they stop; what the caller itself
                    # cancels is never tried again.
                    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
                },
            }
        ],
        # All calls to a server that ends may fail at once, and all of them are to be tried again;
        # half of the tokens may be used up, one by each failure.
        "retryThrottling": {"maxTokens": 1000, "tokenRatio": 1},
    }
