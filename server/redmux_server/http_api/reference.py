"""The page at /docs: the OpenAPI document for people, with no script and nothing from elsewhere."""

import asyncio
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from redmux_server.http_api.playground import HEADERS

Json = Mapping[str, Any]

_REF = "#/components/schemas/"
_BOUNDS = {
    "minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most",
    "exclusiveMaximum": "below", "maxLength": "characters at most", "maxItems": "items at most",
}  # fmt: skip
_FAILURES = ("4XX", "5XX")  # of every path, told once
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} API</title>
<link rel="icon" href="/page/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="/page/style.css">
<link rel="stylesheet" href="/page/reference.css">
</head>
<body>
<a class="skip" href="#paths">Skip to the paths</a>
<header>
<div class="mark"><img src="/page/icon.svg" alt="" width="26" height="26"><h1>{title} API</h1></div>
<p class="note">{version}</p>
<p class="links"><a href="/">Playground</a> <a href="/openapi.json">OpenAPI document</a></p>
</header>
<main>
<p>{description} A call opens by a click, or by Enter. Fields in bold have to be there.</p>
<nav aria-label="Calls">{index}</nav>
<div id="paths">{sections}</div>
<section><h2 id="types">Types</h2>{types}</section>
</main>
</body>
</html>
"""


def router(document: Callable[[], Json]) -> APIRouter:
    """Returns the route of the page, which is written at the first request."""
    router = APIRouter(include_in_schema=False)

    @functools.cache
    def page() -> str:
        return written(document())

    @router.api_route("/docs", methods=["GET", "HEAD"])
    async def docs() -> Response:
        data = await asyncio.to_thread(page)  # takes half a second once
        return Response(data, headers=HEADERS, media_type="text/html")

    return router


def written(document: Json) -> str:
    """Returns an OpenAPI document as a page; everything that it says is text there."""
    by_tag: dict[str, list[tuple[str, str, Json]]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            by_tag.setdefault(operation["tags"][0], []).append((method, path, operation))
    schemas = document["components"]["schemas"]
    info = {key: escape(document["info"][key]) for key in ("title", "version", "description")}
    index = "".join(
        f"<div><h2>{escape(tag)}</h2><ul>{''.join(_entry(m, p) for m, p, _ in calls)}</ul></div>"
        for tag, calls in by_tag.items()
    )
    sections = "".join(
        f"<section><h2>{escape(tag)}</h2>{''.join(_call(*c, schemas) for c in calls)}</section>"
        for tag, calls in by_tag.items()
    )
    types = "".join(
        _details(f"type-{name}", "", name, schema.get("description", ""), _fields(schema))
        for name, schema in sorted(schemas.items())
    )
    return _PAGE.format(**info, index=index, sections=sections, types=types)


def _place(method: str, path: str) -> str:
    return method + "".join(c if c.isalnum() else "-" for c in path)


def _entry(method: str, path: str) -> str:
    return f'<li><a href="#{_place(method, path)}">{method.upper()} {escape(path)}</a></li>'


def _call(method: str, path: str, operation: Json, schemas: Json) -> str:
    first, _, rest = operation.get("description", "").partition("\n")
    parts = [f"<p>{escape(rest)}</p>" if rest.strip() else ""]
    if parameters := operation.get("parameters", ()):
        rows = ((p["name"], p["schema"] | _told(p), p.get("required")) for p in parameters)
        parts.append(f"<h3>In the path and its query</h3>{_table(rows)}")
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = content["schema"]
        named = schemas[schema["$ref"].removeprefix(_REF)] if "$ref" in schema else schema
        fields = _fields(named) if "properties" in named else f"<p>{_type(schema)}</p>"
        parts.append(f"<h3>Body: {escape(kind)}</h3>{fields}")
    answers = "".join(
        f"<li>{escape(status)}: {_type(content['schema'])} <code>{escape(kind)}</code></li>"
        for status, answer in operation["responses"].items() if status not in _FAILURES
        for kind, content in answer.get("content", {}).items()
    )  # fmt: skip
    failure = _type({"$ref": f"{_REF}Failure"})
    parts.append(f"<h3>Answers</h3><ul>{answers}<li>4XX, 5XX: {failure}</li></ul>")
    return _details(_place(method, path), method.upper(), path, first, "".join(parts))


def _details(place: str, before: str, name: str, told: str, inner: str) -> str:
    """Returns what opens by its line; a browser opens it for who comes to its place inside."""
    return (
        f"<details><summary><b>{before}</b> <code>{escape(name)}</code> "
        f'<span>{escape(told)}</span></summary><div id="{escape(place)}">{inner}</div></details>'
    )


def _told(of: Json) -> Json:
    return {"description": of["description"]} if "description" in of else {}


def _fields(schema: Json) -> str:
    needed = schema.get("required", ())
    rows = ((name, f, name in needed) for name, f in schema.get("properties", {}).items())
    return _table(rows) if "properties" in schema else f"<p>{_type(schema)}</p>"


def _table(rows: Iterable[tuple[str, Json, bool | None]]) -> str:
    lines = []
    for name, schema, is_needed in rows:
        label = f"<b>{escape(name)}</b>" if is_needed else escape(name)
        told = escape(schema.get("description", ""))
        if schema.get("default") is not None:
            told += f" Default: {_code(schema['default'])}"
        lines.append(f"<tr><th scope=row>{label}</th><td>{_type(schema)}</td><td>{told}</td></tr>")
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def _type(schema: Json) -> str:
    """Returns what a value has to be."""
    if "$ref" in schema:
        name = escape(schema["$ref"].removeprefix(_REF))
        return f'<a href="#type-{name}">{name}</a>'
    if "const" in schema:
        return _code(schema["const"])
    if "enum" in schema:
        return " or ".join(map(_code, schema["enum"]))
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    kind = "bytes" if schema.get("format") == "binary" else schema.get("type", "any value")
    told = escape(kind)
    if kind == "array":
        told = f"list of {_type(schema.get('items', {}))}"
    elif isinstance(schema.get("additionalProperties"), Mapping):
        told = f"object of {_type(schema['additionalProperties'])}"
    bounds = [f"{words} {schema[key]:g}" for key, words in _BOUNDS.items() if key in schema]
    return f"{told} ({escape(', '.join(bounds))})" if bounds else told


def _code(value: Any) -> str:
    return f"<code>{escape(json.dumps(value))}</code>"
