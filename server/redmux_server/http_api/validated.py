"""Bodies and queries of requests: strict JSON, and what is wrong with them in words."""

import email.message
import re
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec
from fastapi import HTTPException, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from redmux.errors import RedmuxError
from redmux_server.http_api.answers import error_response
from redmux_server.http_api.errors import Refusal
from redmux_server.http_api.schemas.body import Body
from redmux_server.internal_errors import told

_SHOWN = 3  # faults that are told of a request
_SHOWN_CHARS = 80
# Clients for Azure send it with whatever they ask.
NO_EFFECT = frozenset(("api-version",))
_KEYED = re.compile(r"([^\[\]]+)\[[^\[\]]+\]")  # of a parameter that is an object


class JsonRequest(Request):
    """A request whose body is JSON of the standard: no NaN, no lone surrogates, not too deep."""

    _given: Any = None

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
        if self._given is not None:
            return self._given
        try:
            self._given = msgspec.json.decode(await self.body())
            return self._given
        except (msgspec.DecodeError, RecursionError, UnicodeError, ValueError) as err:
            raise HTTPException(400, f"the body is no valid JSON: {err}") from None


class KnownRoute(APIRoute):
    """A route that ignores no parameter of a query: it refuses those that it has not."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See APIRoute."""
        handle = super().get_route_handler()
        names = [field.alias for field in self.dependant.query_params]
        told = (self.openapi_extra or {}).get("parameters", ())
        objects = [field["name"] for field in told if field.get("style") == "deepObject"]

        async def handle_known(request: Request) -> Response:
            for name in request.query_params:
                keyed = _KEYED.fullmatch(name)
                if (
                    name not in NO_EFFECT
                    and name not in names
                    and not (keyed and keyed[1] in objects)
                ):
                    raise _unknown(name, [*names, *objects])
            return await handle(request)

        return handle_known


class JsonRoute(KnownRoute):
    """A route whose handler gets the body as `JsonRequest` reads it.

    Errors name the fields of the body as they were sent.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See APIRoute."""
        handle = super().get_route_handler()

        bodies = [field.field_info.annotation for field in self.dependant.body_params]

        async def handle_json(request: Request) -> Response:
            request = JsonRequest(request.scope, request.receive)
            try:
                return await handle(request)
            except Refusal:  # in the client's names already, of a body that may be no JSON
                raise
            except RedmuxError as err:
                failed = told(err)
            sent = None
            for body in bodies:
                assert isinstance(body, type)
                assert issubclass(body, Body)
                sent = body.sent(await request.json())
            return error_response(failed, sent=sent)

        return handle_json


def _unknown(name: str, known: Sequence[str]) -> Refusal:
    name = name[:_SHOWN_CHARS]
    some = f"those of this path are {', '.join(known)}" if known else "this path has none"
    return Refusal(
        f"{name} is no parameter of a query here; {some}", param=name, code="invalid_argument"
    )


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
        if message.startswith("must "):
            message = f"{param} {message}"
        return param or None, message
    return param or None, f"{param or 'the body'}: {message[:1].lower()}{message[1:]}"
