"""Journal: the answers that a batch has so far, each written once."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from redmux_server.durable import refusals

logger = logging.getLogger(__name__)

_MARKS = {True: b"+", False: b"-"}


class _Details(msgspec.Struct):
    cached_tokens: int = 0


class Usage(msgspec.Struct):
    """The tokens of one answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Body(msgspec.Struct):
    usage: Usage | None = None


class _Response(msgspec.Struct):
    body: _Body


class _Line(msgspec.Struct):
    custom_id: str
    response: _Response | None = None


_decode = msgspec.json.Decoder(_Line).decode


class Entry(NamedTuple):
    """The answer to one line: a line of the output file, or of that of errors."""

    custom_id: str
    is_output: bool
    line: bytes
    usage: Usage

    @classmethod
    def of(cls, line: bytes, is_output: bool) -> "Entry":
        """Returns the entry of such a line, without its end; raises DecodeError for no line."""
        read = _decode(line)
        usage = None if read.response is None else read.response.body.usage
        return cls(read.custom_id, is_output, line, usage or Usage())


class Journal:
    """Answers in a file, or in memory. Belongs to one task at a time.

    A process that is killed leaves at most one line that is not whole, which the next start cuts
    off and asks for again; so does one that a power cut has left behind.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._kept = bytearray()  # where there is no file
        self._writing = asyncio.Lock()
        self.num_bytes = 0

    async def load(self) -> list[Entry]:
        """Returns the answers that earlier runs have written."""
        async with self._writing:
            entries = await asyncio.to_thread(self._load)
        self.num_bytes = sum(len(entry.line) + 2 for entry in entries)
        return entries

    async def add(self, entry: Entry) -> None:
        """Adds an answer; raises where the folder does not take it."""
        written = _MARKS[entry.is_output] + entry.line + b"\n"
        self.num_bytes += len(written)
        if self._path is None:
            self._kept += written
            return
        # Who goes away in between leaves a whole line, before anything else is read or written.
        await asyncio.shield(self._append_in_turn(written))

    async def contents(self) -> tuple[bytes, bytes]:
        """Returns the output file and that of errors, in the order in which answers came."""
        return await asyncio.to_thread(self._contents)

    async def remove(self) -> None:
        """Forgets the answers."""
        self._kept.clear()
        if self._path is not None:
            with contextlib.suppress(OSError):  # it is written over by nothing else
                await asyncio.to_thread(self._path.unlink, missing_ok=True)

    async def _append_in_turn(self, written: bytes) -> None:
        async with self._writing:
            await asyncio.to_thread(self._append, written)

    def _load(self) -> list[Entry]:
        entries = []
        end = 0
        for line in self._lines():
            entry = _entry(line)
            if entry is None:
                break
            end += len(line)
            entries.append(entry)
        if self._path is not None and self._path.exists() and self._path.stat().st_size > end:
            logger.warning("%s is cut off behind its last whole answer", self._path)
            os.truncate(self._path, end)
        return entries

    def _append(self, written: bytes) -> None:
        assert self._path is not None
        with refusals(self._path.parent, "an answer is not kept", "data", "files"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(written)

    def _contents(self) -> tuple[bytes, bytes]:
        parts: dict[bytes, list[bytes]] = {b"+": [], b"-": []}
        for line in self._lines():
            parts[line[:1]].append(line[1:])
        return b"".join(parts[b"+"]), b"".join(parts[b"-"])

    def _lines(self) -> Iterator[bytes]:
        if self._path is None:
            yield from bytes(self._kept).splitlines(keepends=True)
        elif self._path.exists():
            with self._path.open("rb") as file:
                yield from file


def _entry(line: bytes) -> Entry | None:
    if line[:1] not in _MARKS.values() or not line.endswith(b"\n"):
        return None
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
        return Entry.of(line[1:-1], line[:1] == b"+")
    return None
