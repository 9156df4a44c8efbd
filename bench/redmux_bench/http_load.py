"""The same loads over HTTP: streamed completions, read with as little work as it takes."""

import asyncio
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from redmux import RedmuxError
from redmux_bench.load import Call, Wave
from redmux_bench.workload import Planned

_TOKENS = re.compile(rb'"token_ids":\[([0-9,]+)\]')
_FAILED = re.compile(rb'"error":\{"message":"((?:[^"\\]|\\.)*)"')
_LAST = b"0\r\n\r\n"


@dataclass(slots=True)
class HttpLoad:
    """Sends loads to one port, over connections that are kept from wave to wave."""

    host: str
    port: int
    model: str  # the name of the base model there
    timeout_s: float = 600.0  # of each request
    _idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    async def run(self, requests: Sequence[Planned]) -> Wave:
        """Sends all requests at once and returns when each of them has ended."""
        cpu_s, start_s = time.process_time(), time.perf_counter()
        calls = await asyncio.gather(*(self._send(request, start_s) for request in requests))
        return Wave(calls, time.perf_counter() - start_s, time.process_time() - cpu_s)

    def close(self) -> None:
        """Ends the connections."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()

    async def _send(self, request: Planned, start_s: float) -> Call:
        started_s = time.perf_counter() - start_s
        times_s: list[float] = []
        error: RedmuxError | None = None
        try:
            async with asyncio.timeout(self.timeout_s):
                await self._ask(request, start_s, times_s)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, RedmuxError) as err:
            error = err if isinstance(err, RedmuxError) else RedmuxError(repr(err))
        ended_s = time.perf_counter() - start_s
        return Call(len(request.prompt_ids), started_s, tuple(times_s), ended_s, error)

    async def _ask(self, request: Planned, start_s: float, times_s: list[float]) -> None:
        """Notes when the tokens of an answer come; raises RedmuxError for one that fails."""
        pair = self._idle.pop() if self._idle else None
        reader, writer = pair or await asyncio.open_connection(self.host, self.port)
        writer.write(_request(self.model, request))
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 "):
            raise RedmuxError(head.partition(b"\r\n")[0].decode())
        text = b""
        while not text.endswith(_LAST):
            text += await reader.read(1 << 16)
            events, end, rest = text.rpartition(b"\n\n")
            if failed := _FAILED.search(events):
                raise RedmuxError(failed[1].decode())
            now_s = time.perf_counter() - start_s
            for found in _TOKENS.finditer(events):
                times_s += [now_s] * (found[1].count(b",") + 1)
            if end:
                text = rest
            if reader.at_eof():
                raise RedmuxError("the server has ended the connection")
        self._idle.append((reader, writer))


def _request(model: str, request: Planned) -> bytes:
    body = json.dumps({
        "model": request.adapter or model, "prompt": list(request.prompt_ids), "stream": True,
        "max_tokens": request.output_tokens, "ignore_eos": True, "return_token_ids": True,
    }).encode()  # fmt: skip
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
