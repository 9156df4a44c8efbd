"""The lines of a batch's input file, and what is wrong with them."""

from codecs import BOM_UTF8
from typing import NamedTuple

import msgspec

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
MAX_LINES = 50_000
MAX_LINE_BYTES = 4 << 20  # as of any request
_MAX_ID_CHARS = 512
_MOST_FAULTS = 50


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request of a batch; `body` is JSON as it was sent."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class Fault(NamedTuple):
    """What is wrong with a line, or with the whole file where `line` is None."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class _Body(msgspec.Struct):
    stream: bool | None = None


class LineReader:
    """Reads the lines of an input file for one endpoint. Blocks for as long as that takes."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._decode = msgspec.json.Decoder(Line).decode
        self._decode_body = msgspec.json.Decoder(_Body).decode

    def read(self, data: bytes) -> tuple[list[Line], list[Fault]]:
        """Returns the lines in their order, and the first faults; empty lines are left out."""
        lines: dict[str, Line] = {}
        faults: list[Fault] = []
        for number, text in enumerate(data.removeprefix(BOM_UTF8).splitlines(), 1):
            if not text.strip():
                continue
            line = self._line(number, text)
            if isinstance(line, Line) and line.custom_id in lines:
                line = Fault(
                    "duplicate_custom_id", f"custom_id {line.custom_id[:80]!r} was there before",
                    number, "custom_id",
                )  # fmt: skip
            if isinstance(line, Fault):
                faults.append(line)
                if len(faults) == _MOST_FAULTS:
                    break
                continue
            lines[line.custom_id] = line
            if len(lines) > MAX_LINES:
                return [], [Fault("too_many_lines", f"there are more than {MAX_LINES} requests")]
        if not lines and not faults:
            faults.append(Fault("empty_file", "the file has no requests"))
        return list(lines.values()), faults

    def _line(self, number: int, text: bytes) -> Line | Fault:
        if len(text) > MAX_LINE_BYTES:
            return Fault("line_too_long", f"a request has at most {MAX_LINE_BYTES} bytes", number)
        try:
            line = self._decode(text)
            body = self._decode_body(line.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as err:
            return Fault("invalid_json_line", f"the line is no request: {err}", number)
        if not 0 < len(line.custom_id) <= _MAX_ID_CHARS:
            return Fault(
                "invalid_custom_id", f"custom_id has 1 to {_MAX_ID_CHARS} characters", number,
                "custom_id",
            )  # fmt: skip
        if line.method != "POST":
            return Fault("invalid_method", f"method is {line.method[:80]!r}, must be POST", number,
                         "method")  # fmt: skip
        if line.url != self._endpoint:
            return Fault(
                "mismatched_url",
                f"url is {line.url[:80]!r}, must be the batch's endpoint {self._endpoint}",
                number, "url",
            )  # fmt: skip
        if body.stream:
            return Fault("invalid_stream", "the answers of a batch are not streamed; leave stream "
                         "out", number, "body.stream")  # fmt: skip
        return line
