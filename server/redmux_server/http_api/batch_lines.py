"""Lines of batches, answered by the handlers of their endpoints."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

from redmux_server.batches.service import Answer, Reply
from redmux_server.http_api.gate import App, Caller
from redmux_server.services.validation import MAX_PRIORITY


def line_answerer(app: App) -> Answer:
    """Returns what has the lines of batches answered by `app`, as it answers requests."""

    async def answer(endpoint: str, body: bytes, tenant: str, request_id: str) -> Reply:
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": endpoint, "raw_path": endpoint.encode(), "root_path": "",
            "query_string": b"", "headers": [(b"content-type", b"application/json")],
            "client": None, "server": None, "caller": Caller(tenant, request_id, {}),
        }  # fmt: skip
        exchange = _Exchange(_prioritized(body))
        try:
            await app(scope, exchange.receive, exchange.send)
        except Exception:
            if not exchange.is_whole:  # else the answer tells of it, and the log does
                raise
        return exchange.reply()

    return answer


def _prioritized(body: bytes) -> bytes:
    """Returns a JSON object that is behind all others in its tenant's queue.

    Else it is as it was written; of two fields of one name the last counts.
    """
    inner = body.strip()[1:-1].strip()
    return b"{" + inner + (b"," if inner else b"") + b'"priority":%d}' % MAX_PRIORITY


class _Exchange:
    """One request and its answer."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._status = 0
        self._headers: dict[bytes, bytes] = {}
        self._pieces: list[bytes] = []
        self.is_whole = False

    async def receive(self) -> MutableMapping[str, Any]:
        """See ASGI: the body, and then nothing, since nobody goes away."""
        if self._body is None:
            await asyncio.Event().wait()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """See ASGI."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = dict(message["headers"])
            return
        self._pieces.append(message.get("body", b""))
        self.is_whole = not message.get("more_body", False)

    def reply(self) -> Reply:
        """Returns the answer; what says when to try again is to be tried again."""
        wait_ms = self._headers.get(b"retry-after-ms")
        return Reply(
            self._status, b"".join(self._pieces), None if wait_ms is None else int(wait_ms) / 1000
        )
