"""Arguments into messages: what does not fit is named, with what would."""

import difflib
import reprlib
from collections.abc import Iterable, Mapping, Sized
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from redmux.errors import InvalidArgumentError

_KINDS = {
    FieldDescriptor.CPPTYPE_INT32: (f"a whole number up to {2**31 - 1}", "whole numbers"),
    FieldDescriptor.CPPTYPE_INT64: (f"a whole number up to {2**63 - 1}", "whole numbers"),
    FieldDescriptor.CPPTYPE_UINT32: (f"a whole number from 0 to {2**32 - 1}", "whole numbers"),
    FieldDescriptor.CPPTYPE_UINT64: (f"a whole number from 0 to {2**64 - 1}", "whole numbers"),
    FieldDescriptor.CPPTYPE_FLOAT: ("a number", "numbers"),
    FieldDescriptor.CPPTYPE_DOUBLE: ("a number", "numbers"),
    FieldDescriptor.CPPTYPE_BOOL: ("True or False", "truth values"),
    FieldDescriptor.CPPTYPE_STRING: ("a text", "texts"),
}
# Names that other libraries have for the same.
_ELSEWHERE = {
    "model": "adapter", "messages": "prompt", "max_new_tokens": "max_tokens",
    "no_repeat_ngram_size": "no_repeat_ngram", "num_return_sequences": "n",
    "best_of": "n", "include_stop_str_in_output": "include_stop_str",
}  # fmt: skip


def fill(message: Message, *, place: str = "", **values: Any) -> None:
    """Sets fields of a message to values; None leaves one unset.

    Raises InvalidArgumentError that names the field, behind `place`, for a value that it cannot
    hold.
    """
    for name, value in values.items():
        if value is not None:
            put(message, name, value, place + name)


def put(message: Message, field: str, value: Any, name: str) -> None:
    """Sets one field; raises InvalidArgumentError that calls it `name`."""
    held = getattr(message, field)
    is_list = hasattr(held, "extend")
    try:
        if is_list:
            held.extend(value)
        else:
            setattr(message, field, value)
        return
    except (TypeError, ValueError):
        one, many = _KINDS[message.DESCRIPTOR.fields_by_name[field].cpp_type]
    if not is_list:
        raise _wrong(name, value, one)
    if not isinstance(value, Iterable) or not isinstance(value, Sized):
        raise _wrong(name, value, f"a list of {many}")
    for index, item in enumerate(value):
        try:
            held.append(item)
        except (TypeError, ValueError):
            raise _wrong(f"{name}[{index}]", item, one) from None
    raise _wrong(name, value, f"a list of {many}")


def _wrong(name: str, value: Any, wanted: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{name} is {reprlib.repr(value)}, must be {wanted}")


def check_names(given: Mapping[str, Any], known: Iterable[str], callee: str) -> None:
    """Raises TypeError, as Python does, for a keyword that is not known, and says what is meant."""
    known = (*known, "prompt", "timeout_s")
    for name in given:
        if name not in known:
            near = [_ELSEWHERE[name]] if name in _ELSEWHERE else None
            near = near or difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise TypeError(f"{callee} got an unexpected keyword argument {name!r}; {hint}")
