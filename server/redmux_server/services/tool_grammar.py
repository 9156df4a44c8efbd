"""Calls of tools as a grammar: what a model may write that has to call one."""

import functools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from redmux.errors import InvalidArgumentError
from redmux_adapters.text.tool_format import ToolFormat
from redmux_server.services.spec import Chat, GenerationSpec, Grammar, GrammarKind
from redmux_server.services.tools import ToolCallParser

# Each is set, as a schema may bring some of its own. White space is as json.dumps writes it.
_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": False,
}
_NOTHING = {"properties": {}, "additionalProperties": False}


def with_tools(
    spec: GenerationSpec, form: ToolFormat | None
) -> tuple[GenerationSpec, Callable[[], ToolCallParser] | None]:
    """Returns what is asked for with the grammar of the tools, and what makes their parser.

    Raises InvalidArgumentError where there is another grammar already.
    """
    chat = spec.prompt
    if form is None or not isinstance(chat, Chat):
        return spec, None
    is_parallel = chat.parallel_tool_calls
    grammar = tool_grammar(form, chat.tools, chat.tool_choice, is_parallel=is_parallel)
    if grammar is not None:
        if spec.grammar is not None:
            raise InvalidArgumentError(
                f"tool_choice {chat.tool_choice!r} and a grammar exclude each other; leave one out"
            )
        spec = replace(spec, grammar=grammar)
    names = [tool["function"]["name"] for tool in chat.tools]
    return spec, functools.partial(ToolCallParser, form, names, is_parallel=is_parallel)


def tool_grammar(
    form: ToolFormat, tools: Sequence[Mapping[str, Any]], choice: str, *, is_parallel: bool = True
) -> Grammar | None:
    """Returns what makes every completion calls as `choice` wants them, or None for a free choice.

    "required" is one call or more, unless not `is_parallel`; the name of a function is one call of
    it. Arguments follow the function's parameters, by the rules of a JSON schema. The schemas are
    checked by whoever compiles the grammar.
    """
    if choice in ("auto", "none"):
        return None
    functions = [tool["function"] for tool in tools]
    if choice != "required":
        functions = [function for function in functions if function["name"] == choice]
    is_one = choice != "required" or not is_parallel
    before, after = _markup(form.before, form.tokens), _markup(form.after, form.tokens)
    if not form.tag:
        lines = ["start: call"]
    elif form.is_list:
        lines = [f"start: {before} call" + ("" if is_one else ' (", " call)*') + f" {after}"]
    else:
        lines = ["start: tagged" + ("" if is_one else r' ("\n" tagged)*')]
        lines.append(f"tagged: {before} call {after}")
    lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        begin = f'{{"name": "{function["name"]}", "{form.arguments_key}": '
        schema = {**(function.get("parameters") or _NOTHING), "type": "object"}
        lines.append(f'call_{i}: {json.dumps(begin)} arguments_{i} "}}"')
        lines.append(f"arguments_{i}: %json {json.dumps(schema | {'x-guidance': _OPTIONS})}")
    return Grammar(GrammarKind.LARK, "\n".join(lines) + "\n")


def _markup(text: str, tokens: Collection[str]) -> str:
    """Returns a text for Lark, in which the grammar's compiler wants tokens to be named."""
    apart = re.split(f"({'|'.join(map(re.escape, tokens))})" if tokens else "$^", text)
    return " ".join(part if part in tokens else json.dumps(part) for part in apart if part)
