"""Bodies of requests: strict JSON, and what is wrong with them in words."""

import email.message
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec
from fastapi import HTTPException, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from redmux_server.http_api.errors import Refusal

_SHOWN = 3  # faults that are told of a request


class JsonRequest(Request):
    """A request whose body is JSON of the standard: no NaN, no lone surrogates, not too deep."""

    async def body(self) -> bytes:
        """Returns the bytes; raises where they are called something else than JSON."""
        kind = self.headers.get("content-type", "")
        message = email.message.Message()
        message["content-type"] = kind
        if message.get_content_type() != "application/json":
            raise HTTPException(415, f"content-type is {kind[:80]!r}, must be application/json")
        return await super().body()

    async def json(self) -> Any:
        """Returns the body; raises for what is no JSON."""
        try:
            return msgspec.json.decode(await self.body())
        except (msgspec.DecodeError, RecursionError, UnicodeError, ValueError) as err:
            raise HTTPException(400, f"the body is no valid JSON: {err}") from None


class JsonRoute(APIRoute):
    """A route whose handler gets the body as `JsonRequest` reads it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See APIRoute."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


def refusal_of(errors: Sequence[Any]) -> Refusal:
    """Returns what pydantic found wrong with a request as one error, which names the fields."""
    told = [_told(error) for error in errors[:_SHOWN]]
    more = f"; and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
    return Refusal(
        "; ".join(message for _, message in told) + more,
        param=told[0][0], code="invalid_argument",
    )  # fmt: skip


def _told(error: Any) -> tuple[str | None, str]:
    param = ""
    for part in error["loc"][1:]:  # the first is "body", "path" or "query"
        if isinstance(part, int):
            param += f"[{part}]"
        elif part.isidentifier() and part != "str":  # else pydantic's name of an alternative
            param += f".{part}" if param else part
    kind, message = error["type"], error["msg"]
    if kind == "extra_forbidden":
        return param, f"{param} is no field of this request; see /docs"
    if kind == "missing":
        return param or None, f"{param or 'the body'} is missing"
    if kind == "value_error":
        message = message.removeprefix("Value error, ")
        return param or None, message
    return param or None, f"{param or 'the body'}: {message[:1].lower()}{message[1:]}"
