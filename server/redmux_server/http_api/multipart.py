"""Forms with a file, as /v1/files gets them."""

import asyncio
import logging
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from redmux_server.http_api.errors import Refusal

FORM_BYTES = 64 << 10  # of a form beside its file
_KIND = "multipart/form-data"
_MOST_PARTS = 16

# What is wrong with a form is told its sender; it warns the operator of nothing.
logging.getLogger("python_multipart").setLevel(logging.ERROR)


@dataclass(slots=True)
class Part:
    """A field of a form; `filename` is None where it is no file."""

    data: bytes = b""
    filename: str | None = None


@dataclass(slots=True)
class _Reader:
    """What the parser calls."""

    parts: dict[str, Part] = field(default_factory=dict)
    headers: dict[bytes, bytes] = field(default_factory=dict)
    name: bytes = b""
    value: bytes = b""
    pieces: list[bytes] = field(default_factory=list)
    is_whole: bool = False

    def on_part_begin(self) -> None:
        self.headers, self.pieces = {}, []

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self.name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self.value += data[start:end]

    def on_header_end(self) -> None:
        self.headers[self.name.lower()] = self.value
        self.name = self.value = b""

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self.pieces.append(data[start:end])

    def on_part_end(self) -> None:
        _, options = parse_options_header(self.headers.get(b"content-disposition", b""))
        if b"name" not in options:
            raise _refusal("a part has no name")
        name = options[b"name"].decode(errors="replace")
        if name in self.parts:
            raise _refusal(f"there are two fields {name[:80]!r}")
        if len(self.parts) == _MOST_PARTS:
            raise _refusal(f"there are more than {_MOST_PARTS} fields")
        filename = options.get(b"filename")
        self.parts[name] = Part(
            b"".join(self.pieces),
            None if filename is None else filename.decode(errors="replace"),
        )

    def on_end(self) -> None:
        self.is_whole = True


async def read_form(request: Request) -> dict[str, Part]:
    """Returns the fields of a form by name; raises a Refusal for what is none."""
    header = request.headers.get("content-type", "")
    kind, options = parse_options_header(header)
    if kind != _KIND.encode():
        raise Refusal(
            f"content-type is {header[:80]!r}, must be {_KIND}", status=415, code="http_error"
        )
    if not options.get(b"boundary"):
        raise _refusal("content-type names no boundary")
    body = await request.body()
    return await asyncio.to_thread(_parse, options[b"boundary"], body)


def _parse(boundary: bytes, body: bytes) -> dict[str, Part]:
    reader = _Reader()
    calls = {name: getattr(reader, name) for name in dir(reader) if name.startswith("on_")}
    try:
        parser = MultipartParser(boundary, calls)  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError as err:
        raise _refusal(str(err)) from None
    if not reader.is_whole:
        raise _refusal("it ends before its last boundary")
    return reader.parts


def _refusal(reason: str) -> Refusal:
    return Refusal(f"the body is no form with a file: {reason}", code="invalid_form")
