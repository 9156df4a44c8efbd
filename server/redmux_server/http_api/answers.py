"""Answers of one piece."""

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from redmux.errors import RedmuxError
from redmux_server.http_api.errors import body_of, headers_of, status_of
from redmux_server.http_api.sent import Sent

_JSON = "application/json"


def json_response(
    data: Any, headers: Mapping[str, str] | None = None, status: int = 200
) -> Response:
    """Returns this as JSON; what is not finite in it becomes null."""
    return Response(msgspec.json.encode(data), status, headers, _JSON)


def error_response(
    err: RedmuxError, headers: Mapping[str, str] | None = None, sent: Sent | None = None
) -> Response:
    """Returns an error in OpenAI's body, in the names of what was sent."""
    told = {name.decode(): value.decode() for name, value in headers_of(err)}
    return json_response(body_of(err, sent), {**told, **(headers or {})}, status_of(err))
