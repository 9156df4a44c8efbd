"""How a server is named, and what it means when gRPC cannot reach it there: one sentence each."""

import re
from collections.abc import Iterator
from typing import Any

from redmux.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    RedmuxError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)

DEFAULT_PORT = 50051

_URL = re.compile(r"(?P<scheme>\w+)://(?P<address>[^/]+)/?", re.ASCII)
# Schemes of gRPC whose addresses are host:port, and those whose are not.
_RESOLVED = re.compile(r"(dns|ipv4|ipv6):(///?)?")
_OTHER = re.compile(r"(unix|unix-abstract|vsock|xds):")
_ADDRESS = re.compile(r"(\[[^\]]+\]|[^][:/\s]+):(?P<port>\d+)", re.ASCII)


def check_target(target: Any) -> None:
    """Raises InvalidArgumentError for what names no host and port, saying what would.

    gRPC itself would try port 443 where there is none, and look a URL up as a host's name.
    """
    if not isinstance(target, str) or not target:
        raise InvalidArgumentError(f"target is a text like 'host:port', not {target!r}")
    if _OTHER.match(target):
        return
    scheme = _RESOLVED.match(target)
    if scheme is None and (url := _URL.fullmatch(target)):
        also = " with tls=True" if url["scheme"] in ("https", "grpcs") else ""
        raise InvalidArgumentError(
            f"target is {target!r}, a URL; write {_with_port(url['address'])}{also}"
        )
    addresses = target[scheme.end() :] if scheme else target
    if scheme is None and "," in addresses:
        raise InvalidArgumentError(
            f"target is {target!r}; several addresses are written 'ipv4:10.0.0.1:{DEFAULT_PORT},"
            f"10.0.0.2:{DEFAULT_PORT}', or dns:/// with a name that stands for all of them"
        )
    for address in addresses.split(","):
        # A name server may stand before the name: dns://10.0.0.53/name:port.
        _check_address(target, address.rpartition("/")[2] if scheme else address)


def _check_address(target: str, address: str) -> None:
    parts = _ADDRESS.fullmatch(address)
    if parts is None:
        is_bare = re.fullmatch(r"[^][:/\s]+|\[[^\]]+\]|[\da-fA-F:.]*::?[\da-fA-F:.]*", address)
        if address and not address.startswith(":50") and is_bare:
            raise InvalidArgumentError(
                f"target is {target!r}, which has no port; write {_with_port(address)}"
            )
        raise InvalidArgumentError(f"target is {target!r}; write host:port")
    if not 0 < int(parts["port"]) < 65536:
        raise InvalidArgumentError(
            f"target is {target!r}; a port is a number from 1 to 65535, not {parts['port']}"
        )


def _with_port(address: str) -> str:
    if _ADDRESS.fullmatch(address):
        return address
    is_ipv6 = address.count(":") > 1 and not address.startswith("[")
    return f"[{address}]:{DEFAULT_PORT}" if is_ipv6 else f"{address}:{DEFAULT_PORT}"


def is_shared(target: str) -> bool:
    """Whether the target stands for several servers that share the calls."""
    return "," in target or target.startswith("dns:")


# What gRPC's texts of failed connections mean; the first that is found counts. {target} is what was
# tried, {0} the first group, if there is one.
_MEANINGS = {
    "backend unhealthy|health check": (
        "no server of {target} is serving now; they may be starting or draining, so try again"
    ),
    "Connection refused|No such file or directory": (
        "no server at {target} (connection refused); is `redmux serve` running there?"
    ),
    "hostname lookup error|Domain name not found|DNS resolution failed": (
        "the host of {target} is not known here; check the target's spelling"
    ),
    "WRONG_VERSION_NUMBER": "the server at {target} speaks no TLS; leave out tls=True",
    r"CERTIFICATE_VERIFY_FAILED: ([\w ]+)": (
        "the certificate of {target} is not trusted ({0}); give that of its authority by "
        "root_certificates"
    ),
    "Hostname Verification Check failed": (
        "the certificate of {target} is for another name; connect by a name that it holds"
    ),
    "missing selected ALPN": (
        "what listens at {target} speaks no gRPC; is it the port of another service?"
    ),
    "Failed parsing HTTP/2|before receiving SETTINGS": (
        "what listens at {target} speaks no gRPC; is it the port of another service, "
        "that of /metrics perhaps?"
    ),
    r"http2 header with status: (\d+)": (
        "what listens at {target} answers with HTTP status {0}; is it the port of another service, "
        "or a proxy that does not know the server?"
    ),
}
_CLOSED = re.compile("Socket closed|Connection reset|Broken pipe")
_NOT_CONNECTED = re.compile("failed to connect to all addresses|connections to all backends")


def explained(
    error: RedmuxError, target: str, timeout_s: float, *, has_tls: bool, has_key: bool
) -> RedmuxError:
    """Returns the error with what gRPC itself says of it turned into one sentence with a remedy.

    What a server says stays as it is.
    """
    texts = _texts(error, target, timeout_s, has_tls, has_key)
    return next((type(error)(text) for text in texts), error)


def _texts(
    error: RedmuxError, target: str, timeout_s: float, has_tls: bool, has_key: bool
) -> Iterator[str]:
    message = error.message
    if isinstance(error, DeadlineExceededError) and "Deadline Exceeded" in message:
        yield f"no whole answer from {target} within {timeout_s:g} s; timeout_s sets the limit"
    elif isinstance(error, UnauthenticatedError) and not has_key:
        yield f"{message}; this client sends none, give api_key"
    elif isinstance(error, UnimplementedError) and message == "Method not found!":
        yield (
            f"the server at {target} does not know this call; is it the port of another service, "
            "or an older redmux?"
        )
    elif isinstance(error, UnavailableError | UnimplementedError):
        yield from _meanings(message, target, has_tls)


def _meanings(message: str, target: str, has_tls: bool) -> Iterator[str]:
    for pattern, text in _MEANINGS.items():
        if found := re.search(pattern, message):
            yield text.format(*found.groups(), target=target)
    is_unconnected = _NOT_CONNECTED.search(message) is not None
    if _CLOSED.search(message):
        if is_unconnected and not has_tls:
            yield (
                f"the server at {target} closes connections at once; if it uses TLS, give "
                "tls=True or root_certificates"
            )
        yield f"the server at {target} closed the connection; it may have ended, so try again"
    if is_unconnected:
        yield f"cannot reach {target}: {message}"
