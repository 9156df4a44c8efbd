"""Server-sent events: what is ready goes out as bytes, with nothing in between."""

import contextlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Protocol

import msgspec
from starlette.responses import Response

from redmux_server.http_api.deadline import within
from redmux_server.http_api.errors import DONE, error_event
from redmux_server.internal_errors import told

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # proxies hold streams back otherwise
}
_encode = msgspec.json.Encoder().encode


class EventStream(Response):
    """An answer that is streamed; its error, once it is under way, is its last event."""

    def __init__(
        self, chunks: AsyncGenerator[bytes], headers: Mapping[str, str],
        timeout_s: float | None = None,
    ) -> None:  # fmt: skip
        """`chunks` are whole events; `timeout_s` is how long all of them may take."""
        super().__init__(headers=_HEADERS | dict(headers))
        del self.headers["content-length"]
        self._chunks = chunks
        self._timeout_s = timeout_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        last = b""
        async with contextlib.aclosing(self._chunks) as chunks:
            try:
                async with within(self._timeout_s):
                    async for chunk in chunks:
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except Exception as err:
                last = error_event(told(err))
        await send({"type": "http.response.body", "body": last})


class StreamOptions(Protocol):
    """What clients may ask of a stream."""

    include_usage: bool
    continuous_usage_stats: bool


class Chunks:
    """The chunks of one completion or chat; what is the same in all is encoded once."""

    def __init__(self, head: Mapping[str, Any], options: StreamOptions | None) -> None:
        """`head` are the fields before the choices."""
        self._begin = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._tells_usage = options is not None and options.include_usage
        self._tells_always = options is not None and options.continuous_usage_stats
        self._counts: dict[int, tuple[int, int]] = {}  # of a choice: prompt, completion

    def count(self, index: int, num_prompt: int, num_new: int) -> None:
        """Counts the tokens of a choice's next chunk."""
        if self._tells_always:
            _, num_before = self._counts.get(index, (0, 0))
            self._counts[index] = num_prompt, num_before + num_new

    def of(self, choice: Mapping[str, Any], redmux: Mapping[str, Any] | None = None) -> bytes:
        """Returns a chunk with this choice."""
        end = b"]"
        if redmux is not None:
            end += b',"redmux":' + _encode(redmux)
        if self._tells_always:
            end += b',"usage":' + self._usage(choice["index"])
        elif self._tells_usage:
            end += b',"usage":null'
        return self._begin + _encode(choice) + end + b"}\n\n"

    def end(self, usage: Mapping[str, Any]) -> bytes:
        """Returns the end of the stream, with its usage if that was asked for."""
        if not self._tells_usage:
            return DONE
        return self._begin + b'],"usage":' + _encode(usage) + b"}\n\n" + DONE

    def _usage(self, index: int) -> bytes:
        num_prompt, num_new = self._counts.get(index, (0, 0))
        return _encode(
            {
                "prompt_tokens": num_prompt,
                "completion_tokens": num_new,
                "total_tokens": num_prompt + num_new,
            }
        )
