"""What a failed call stands for: statuses to errors. No I/O, shared by both clients."""

from collections.abc import Iterable, Mapping
from typing import cast

import grpc

from redmux import errors
from redmux.errors import RedmuxError, ResourceExhaustedError

_ERROR_OF_STATUS: dict[grpc.StatusCode, type[RedmuxError]] = {
    kind.status: kind for kind in RedmuxError.__subclasses__()
}
# Classes that share the status of their parent; the server names them in its trailing metadata.
_ERROR_OF_NAME: dict[str, type[RedmuxError]] = {
    kind.__name__: kind for kind in (errors.InvalidAdapterError, errors.WrongBaseError)
}


def error_of(rpc_error: grpc.RpcError) -> RedmuxError:
    """Returns the redmux error that a failed call stands for."""
    status = rpc_error.code()
    pairs = cast("Iterable[tuple[str, str | bytes]]", rpc_error.trailing_metadata() or ())
    # iter, since dict would take grpc.aio's Metadata for a mapping, whose keys are pairs.
    metadata = dict(iter(pairs))
    kind = _ERROR_OF_STATUS.get(status, RedmuxError)
    named = _ERROR_OF_NAME.get(str(metadata.get("redmux-error")))
    if named is not None and named.status is status:
        kind = named
    message = rpc_error.details() or f"the call ended with {status.name} and no explanation"
    if kind is ResourceExhaustedError:
        return ResourceExhaustedError(message, _retry_after_s(metadata))
    return kind(message)


def _retry_after_s(metadata: Mapping[str, str | bytes]) -> float | None:
    try:
        pushback_ms = int(metadata["grpc-retry-pushback-ms"])
    except (KeyError, ValueError):
        return None
    return pushback_ms / 1000 if pushback_ms >= 0 else None
