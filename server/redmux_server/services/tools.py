"""ToolCallParser: calls of tools in what a model writes, while it writes."""

import json
import secrets
import sys
from collections.abc import Callable, Collection, Generator, Iterable
from dataclasses import dataclass

from redmux_adapters.text.tool_format import ToolFormat

_PYTHON_TAG = "<|python_tag|>"
_CLOSING = {"{": "}", "[": "]"}
_SPACE = " \t\r\n"
_KEYS = frozenset({"name", "arguments", "parameters", "id", "type"})
_Chars = Generator[None, str, str]  # takes one character after the other


@dataclass(slots=True)
class ToolCallDelta:
    """A part of a call: the first of a call has its id and name, each may have arguments.

    The arguments of all parts, joined, are JSON if the model has written JSON to their end.
    """

    index: int  # of the call
    id: str = ""
    name: str = ""
    arguments: str = ""


class ToolCallParser:
    """Parses the text of one completion into calls of tools and what is none.

    A call is one of a function that is offered, in the template's format. Whatever else looks like
    one, or breaks off before its name and the beginning of its arguments are there, is text as it
    stands. One that breaks off later keeps the arguments so far; the rest is text. White space
    around calls belongs to nobody. However the text is cut into pieces, the results joined are
    the same. It takes time in proportion to the text.
    """

    def __init__(
        self, form: ToolFormat, names: Collection[str], *, is_parallel: bool = True
    ) -> None:
        """`names` are those of the functions; unless `is_parallel`, calls after the first go."""
        self._form = form
        self._names = frozenset(names)
        self._most = sys.maxsize if is_parallel else 1
        self.num_calls = 0
        # Read but not given out: what may be around a call or in one, then a part of a tag.
        self._held: list[str] = []
        self._part = ""
        self._again: list[str] = []  # read, but for others to read again, the next one last
        self._is_begun = False  # whether there was text since the beginning, or the last call
        # To be given out.
        self._text: list[str] = []
        self._deltas: list[ToolCallDelta] = []
        self._arguments: list[str] = []
        self._reading = self._read()
        next(self._reading)

    def push(self, text: str, *, is_last: bool = False) -> tuple[str, list[ToolCallDelta]]:
        """Returns what is certain now, with the last text everything: text, and parts of calls."""
        for char in text:
            self._reading.send(char)
        if is_last:
            self._flush()
        return self._given()

    def _flush(self) -> None:
        """Gives out as text what is left at the end."""
        left = "".join([*self._held, self._part])
        if left.strip() or self._is_begun or not self.num_calls:
            self._text.append(left)
        self._held, self._part = [], ""

    def _given(self) -> tuple[str, list[ToolCallDelta]]:
        self._settle()
        text, deltas = "".join(self._text), self._deltas
        self._text, self._deltas = [], []
        return text, deltas

    # -- text ---------------------------------------------------------------------------------

    def _read(self) -> Generator[None, str, None]:
        while True:
            yield from self._read_text()
            try:
                yield from self._read_calls()
            except _NoCallError as err:
                self._say()
                self._again.extend(reversed(err.again))

    def _next(self) -> _Chars:
        if self._again:
            return self._again.pop()
        char: str = yield
        return char

    def _say(self) -> None:
        """Gives out as text what is held."""
        self._is_begun = self._is_begun or bool("".join(self._held).strip())
        self._text.extend(self._held)
        self._held.clear()

    def _read_text(self) -> Generator[None, str, None]:
        """Returns where a call may begin, with its tag held."""
        while True:
            self._part += yield from self._next()
            while self._part and not any(tag.startswith(self._part) for tag in self._tags()):
                self._held.append(self._part[0])
                if not self._is_blank(self._part[0]):
                    self._say()
                self._part = self._part[1:]
            if self._part in self._tags():
                if self._part in _CLOSING:
                    self._again.append(self._part)  # it belongs to the call
                else:
                    self._held.append(self._part)
                self._part = ""
                return

    def _is_blank(self, char: str) -> bool:
        """Whether nobody misses it if a call follows; bare calls may stand behind a semicolon."""
        return char in _SPACE or (char == ";" and self._is_after_bare_call())

    def _is_after_bare_call(self) -> bool:
        return not self._form.tag and self.num_calls > 0 and not self._is_begun

    def _tags(self) -> tuple[str, ...]:
        """Returns what begins a call here."""
        form = self._form
        bare = () if self._is_begun else ("{", "[") if form.is_list else ("{",)
        if not form.tag:
            return (_PYTHON_TAG, *bare)
        # A tag that is a special token never comes as text.
        return (form.tag, *bare) if form.is_special else (form.tag,)

    # -- calls; what is read is held until it is a call for sure -------------------------------

    def _read_calls(self) -> Generator[None, str, None]:
        """Reads an object, or a list of them, and the tag behind."""
        char = yield from self._solid()
        is_list = char == "[" and bool(self._form.tag)
        if is_list:
            self._held.append(char)
            char = yield from self._solid()
        while True:
            self._expect(char, "{")
            yield from self._read_call()
            self._held.clear()
            self._is_begun = False
            if not is_list:
                break
            char = yield from self._solid()
            if char == "]":
                break
            self._expect(char, ",")
            char = yield from self._solid()
        self._held.clear()
        yield from self._read_end(self._form.end_tag)
        self._held.clear()

    def _read_end(self, tag: str) -> Generator[None, str, None]:
        """Reads what ends a call; where it is missing, what is there is read again."""
        for i, expected in enumerate(tag):
            char = yield from (self._next() if i else self._solid())
            if char != expected:
                self._again.append(char)
                self._again.extend(reversed(self._held))
                return
            self._held.append(char)

    def _read_call(self) -> Generator[None, str, None]:
        """Reads an object from behind its { on."""
        name = arguments = ""
        keep = self._held.append
        char = yield from self._solid()
        while True:
            key = yield from self._string(char)
            if not self._form.tag and key not in _KEYS:
                raise _NoCallError("")  # an answer in JSON, which nobody should have to wait for
            self._expect((yield from self._solid()), ":")
            char = yield from self._solid()
            if key == "name" and not name:
                name = yield from self._string(char)
                if name not in self._names:
                    raise _NoCallError("")
                if arguments:
                    self._begin(name)
                    self._arguments.append(arguments)
            elif key in ("arguments", "parameters") and not arguments:
                if char != "{":
                    raise _NoCallError(char)
                if name:
                    self._begin(name)
                    keep = self._arguments.append
                arguments = yield from self._nested(char, keep)
            else:
                yield from self._other(char)
            char = yield from self._solid()
            if char == "}":
                break
            self._expect(char, ",")
            char = yield from self._solid()
        if not name:
            raise _NoCallError(char)
        if not arguments:
            self._begin(name)
            self._arguments.append("{}")

    def _begin(self, name: str) -> None:
        """Gives out that a call of `name` begins; nothing of it is text any more."""
        self._settle()
        call_id = f"call_{secrets.token_hex(12)}"
        self._deltas.append(ToolCallDelta(self.num_calls, call_id, name))
        self.num_calls += 1
        self._held.clear()

    def _settle(self) -> None:
        """Puts the arguments since the last time into a delta, and lets go of superfluous calls."""
        if self._arguments:
            index = self.num_calls - 1
            if not self._deltas:
                self._deltas.append(ToolCallDelta(index))
            self._deltas[-1].arguments += "".join(self._arguments)
            self._arguments.clear()
        self._deltas = [delta for delta in self._deltas if delta.index < self._most]

    def _solid(self) -> _Chars:
        """Returns the next character that is no white space, and holds what is."""
        while (char := (yield from self._next())) in _SPACE:
            self._held.append(char)
        return char

    def _expect(self, char: str, expected: str) -> None:
        if char != expected:
            raise _NoCallError(char)
        self._held.append(char)

    def _string(self, char: str) -> _Chars:
        """Returns the value of a string that `char` begins."""
        self._expect(char, '"')
        start, is_escaped = len(self._held) - 1, False
        while char != '"' or is_escaped or len(self._held) == start + 1:
            is_escaped = char == "\\" and not is_escaped
            char = yield from self._next()
            self._held.append(char)
        try:
            value: str = json.loads("".join(self._held[start:]), strict=False)
        except ValueError:
            raise _NoCallError("") from None
        return value

    def _nested(self, char: str, keep: Callable[[str], object]) -> _Chars:
        """Returns an object or a list that `char` begins, told to `keep` as far as it is one."""
        text, closing = [char], [_CLOSING[char]]
        is_string = is_escaped = False
        keep(char)
        while closing:
            char = yield from self._next()
            if is_string:
                is_string = char != '"' or is_escaped
                is_escaped = char == "\\" and not is_escaped
            elif char == '"':
                is_string = True
            elif char in _CLOSING:
                closing.append(_CLOSING[char])
            elif char in "]}" and char != closing.pop():
                raise _NoCallError(char)
            keep(char)
            text.append(char)
        return "".join(text)

    def _other(self, char: str) -> Generator[None, str, None]:
        """Reads a value that nobody asked for."""
        if char == '"':
            yield from self._string(char)
        elif char in _CLOSING:
            yield from self._nested(char, self._held.append)
        else:
            while char.isalnum() or char in "+-.":
                self._held.append(char)
                char = yield from self._next()
            self._again.append(char)


def whole_calls(deltas: Iterable[ToolCallDelta]) -> list[ToolCallDelta]:
    """Returns the calls that parts of calls, in their order, make."""
    calls: list[ToolCallDelta] = []
    arguments: list[list[str]] = []
    for delta in deltas:
        if delta.id:
            calls.append(delta)
            arguments.append([])
        arguments[-1].append(delta.arguments)
    for call, parts in zip(calls, arguments, strict=True):
        call.arguments = "".join(parts)
    return calls


class _NoCallError(Exception):
    """What is held is no call; `again` is what was read and is not held."""

    def __init__(self, again: str) -> None:
        super().__init__(again)
        self.again = again
