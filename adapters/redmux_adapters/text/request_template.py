"""RequestTemplate: a chat template that came with a request, as far as such code can be bounded."""

import sys
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

from redmux.errors import InvalidArgumentError

MAX_TEMPLATE_BYTES = 1 << 16
MAX_OUTPUT_CHARS = 1 << 22
MAX_RENDER_S = 1.0  # of the thread's own time
_LARGEST = 1 << 31
_OPERATORS = frozenset({"*", "**", "%"})
# What makes a long text of a number.
_FILTERS = frozenset({"batch", "center", "format", "indent", "slice", "wordwrap"})
_METHODS = frozenset(
    {"center", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill"}
)


class RequestTemplate:
    """Renders as transformers does, in its sandbox, within limits of size and time.

    One step of the template may still take all the memory that there is, so this is for callers
    who are trusted that far. Raises InvalidArgumentError for what is no template.
    """

    def __init__(self, source: str) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        if (num_bytes := len(source.encode(errors="surrogatepass"))) > MAX_TEMPLATE_BYTES:
            raise InvalidArgumentError(
                f"the request's chat template has {num_bytes} bytes; limit {MAX_TEMPLATE_BYTES}"
            )
        environment = _compile_jinja_template("").environment.overlay()
        environment.intercepted_binops = _OPERATORS
        environment.call_binop = _calculated
        is_safe = environment.is_safe_callable
        environment.is_safe_callable = lambda called: (
            getattr(called, "__name__", None) not in _METHODS and is_safe(called)
        )
        environment.filters = {
            name: filter_ for name, filter_ in environment.filters.items() if name not in _FILTERS
        }
        try:
            with _Deadline():
                self._template = environment.from_string(source)
        except InvalidArgumentError:
            raise
        except Exception as err:  # a stranger's code: anything
            raise InvalidArgumentError(f"the request's chat template is none: {err}") from None

    def render(self, variables: Mapping[str, Any]) -> str:
        """Returns the text; raises InvalidArgumentError beyond the limits, else what it raises."""
        pieces, length = [], 0
        with _Deadline():
            for piece in self._template.generate(variables):
                length += len(piece)
                if length > MAX_OUTPUT_CHARS:
                    raise InvalidArgumentError(
                        f"the request's chat template wrote more than {MAX_OUTPUT_CHARS} characters"
                    )
                pieces.append(piece)
        return "".join(pieces)


def _calculated(context: Any, operator: str, left: Any, right: Any) -> Any:
    """Stands for the operators that make much of little: they are for small numbers only."""
    for value in (left, right):
        if not isinstance(value, int | float) or not -_LARGEST < value < _LARGEST:
            raise InvalidArgumentError(
                f"the request's chat template uses {operator} on more than small numbers"
            )
    if operator == "**":
        return float(left) ** right
    return left * right if operator == "*" else left % right


class _Deadline:
    """Ends Python code of this thread, whatever it loops over, once it has had its time."""

    def __enter__(self) -> None:
        self._previous, end_s = sys.gettrace(), time.thread_time() + MAX_RENDER_S

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            if time.thread_time() > end_s:
                raise InvalidArgumentError(
                    f"the request's chat template took more than {MAX_RENDER_S:g} s"
                )
            return trace

        sys.settrace(trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._previous)
