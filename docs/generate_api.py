"""Writes docs/api.md from the code: `make api`, or `python docs/generate_api.py`.

HTTP comes from the OpenAPI document of the server's application, gRPC from the files in proto/, the
client from its signatures. `TASKS` alone is written by hand, and has to name whatever there is.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import redmux
from redmux import errors, training, types
from redmux.v1 import (
    adapter_service_pb2,
    admin_service_pb2,
    inference_service_pb2,
    training_service_pb2,
)
from redmux_server.http_api.app import make_app

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
WIDE = 96  # characters of a signature in one line

INTRODUCTION = """\
# API

What can be asked of a server, by HTTP, by gRPC and by the Python client, on one page, which \
`make api` writes from the code. What the fields mean is told in [http.md](http.md), \
[sampling.md](sampling.md), [chat.md](chat.md) and [structured_output.md](structured_output.md), \
and in the comments of `proto/redmux/v1/`. Commands of a shell: [command.md](command.md).
"""

# What is to be done; over HTTP; over gRPC; with the client, whose asynchronous twin has the same.
TASKS = (
    ("complete a text", "POST /v1/completions", "Generate Complete",
     "Client.generate Client.stream"),
    ("answer a chat", "POST /v1/chat/completions, POST /v1/responses", "Generate Complete",
     "Client.generate Client.stream"),
    ("ask several adapters at once",
     "POST /v1/side_by_side, DELETE /v1/side_by_side/{request_id}/{index}", "", ""),
    ("complete many texts", "POST /v1/completions", "Complete", "Client.map"),
    ("tell how likely a text is", "POST /v1/completions", "Score", "Client.score"),
    ("embed texts", "POST /v1/embeddings, POST /pooling", "Embed", "Client.embed"),
    ("classify texts", "POST /classify, POST /pooling", "Classify", "Client.classify"),
    ("compare two texts", "POST /score, POST /v1/score", "", ""),
    ("see the tokens of a text", "POST /tokenize, POST /detokenize", "Tokenize Detokenize",
     "Client.tokenize Client.detokenize"),
    ("list models and adapters",
     "GET /v1/models, GET /v1/models/{model}, GET /v1/adapters, GET /v1/adapters/{name}",
     "ListAdapters GetAdapter", "Adapters.list Adapters.get"),
    ("have the file of an adapter", "GET /v1/adapters/{name}", "DownloadAdapter",
     "Adapters.download"),
    ("name a version of an adapter", "", "SetAlias DeleteAlias",
     "Adapters.set_alias Adapters.delete_alias"),
    ("publish an adapter",
     "PUT /v1/adapters/{name}, POST /v1/load_lora_adapter, POST /load_lora_adapter",
     "PutAdapter", "Adapters.put"),
    ("remove an adapter",
     "DELETE /v1/adapters/{name}, DELETE /v1/models/{model}, POST /v1/unload_lora_adapter, "
     "POST /unload_lora_adapter", "DeleteAdapter", "Adapters.delete"),
    ("train an adapter", "POST /v1/fine_tuning/jobs", "CreateJob", "Jobs.create"),
    ("follow and end a training",
     "GET /v1/fine_tuning/jobs, GET /v1/fine_tuning/jobs/{job_id}, "
     "GET /v1/fine_tuning/jobs/{job_id}/events, GET /v1/fine_tuning/jobs/{job_id}/checkpoints, "
     "POST /v1/fine_tuning/jobs/{job_id}/cancel",
     "GetJob ListJobs WatchJob CancelJob", "Jobs.get Jobs.list Jobs.watch Jobs.cancel"),
    ("keep files",
     "POST /v1/files, GET /v1/files, GET /v1/files/{file_id}, GET /v1/files/{file_id}/content, "
     "DELETE /v1/files/{file_id}", "", ""),
    ("have a file of requests answered later",
     "POST /v1/batches, GET /v1/batches, GET /v1/batches/{batch_id}, "
     "POST /v1/batches/{batch_id}/cancel", "", ""),
    ("ask how the server is", "GET /health, GET /ready, GET /version, GET /metrics, GET /v1/status",
     "GetServerInfo", "Client.health Client.wait_ready Client.info"),
    ("leave", "", "", "Client.close"),
)  # fmt: skip


def page() -> str:
    """Returns the text of the page. Raises ValueError where `TASKS` and the code differ."""
    paths, calls, methods = http_paths(), grpc_calls(), client_methods()
    for place, there in ((1, paths), (2, calls), (3, methods)):
        told = {name for task in TASKS for name in _names(task[place])}
        if told != set(there):
            raise ValueError(f"TASKS of {Path(__file__).name}: {sorted(told ^ set(there))}")
    parts = [INTRODUCTION, *_by_task(), *_http(paths), *_grpc(calls), *_client(methods), *_errors()]
    return "\n".join(parts).rstrip() + "\n"


def _names(cell: str) -> list[str]:
    return cell.split(", ") if "/" in cell else cell.split()


def _by_task() -> Iterator[str]:
    yield "## By task\n"
    yield "| to | HTTP | gRPC | Python |\n|---|---|---|---|"
    for task, *cells in TASKS:
        yield f"| {task} | {' | '.join('<br>'.join(map(_link, _names(cell))) for cell in cells)} |"
    yield ""


def _link(heading: str) -> str:
    anchor = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
    return f"[`{heading}`](#{anchor})"


def http_paths() -> dict[str, dict[str, Any]]:
    """Returns what the OpenAPI document tells of each method and path, schemas put in."""
    app: Any = make_app(mock.Mock())
    document = app.openapi()
    schemas = document.get("components", {}).get("schemas", {})
    found = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {})
            for kind, body in content.items():
                reference = body["schema"].get("$ref", "").rpartition("/")[2]
                operation["body"] = (kind, schemas.get(reference, body["schema"]))
            found[f"{method.upper()} {path}"] = operation
    return found


def _http(paths: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield "## HTTP\n"
    yield (
        "Fields in bold have to be there. `/docs` of a running server has their types, and "
        "`/openapi.json` is the document behind it.\n"
    )
    for name, operation in paths.items():
        yield f"### `{name}`\n"
        yield operation["description"] + "\n"
        query = [one["name"] for one in operation.get("parameters", ()) if one["in"] == "query"]
        if query:
            yield f"Query: {_listed(query)}\n"
        if "body" in operation:
            kind, schema = operation["body"]
            if "properties" not in schema:
                yield f"Body: bytes (`{kind}`)\n"
                continue
            needed = schema.get("required", ())
            # Those that have to be there first, the others in their order.
            fields = sorted(schema["properties"], key=lambda field: field not in needed)
            form = "" if kind == "application/json" else f" (`{kind}`)"
            yield f"Body{form}: {_listed(fields, needed)}\n"


def _listed(names: list[str], needed: Any = ()) -> str:
    return ", ".join(f"**`{name}`**" if name in needed else f"`{name}`" for name in names)


_CALL = re.compile(r"((?:^  //.*\n)*)^  rpc (\w+)\(", re.M)


def grpc_calls() -> dict[str, tuple[str, str, str, dict[str, list[str]]]]:
    """Returns service, signature, comment and fields of what is sent, of each call by its name."""
    found = {}
    for module in (
        inference_service_pb2, adapter_service_pb2, training_service_pb2, admin_service_pb2,
    ):  # fmt: skip
        text = (ROOT / "proto" / module.DESCRIPTOR.name).read_text(encoding="utf-8")
        comments = {call: _prose(comment) for comment, call in _CALL.findall(text)}
        for service in module.DESCRIPTOR.services_by_name.values():
            for call in service.methods:
                stream = "stream " if call.server_streaming else ""
                answer = f"({stream}{call.output_type.name})"
                signature = f"{call.name}({call.input_type.name}) returns {answer}"
                fields = dict(_fields(call.input_type))
                found[call.name] = (service.name, signature, comments[call.name], fields)
    return found


def _fields(message: Any) -> Iterator[tuple[str, list[str]]]:
    """Yields the names of the fields of a message and of those in it."""
    yield message.name, [field.name for field in message.fields]
    for field in message.fields:
        if field.message_type is not None and field.message_type.file.package == "redmux.v1":
            yield from _fields(field.message_type)


def _prose(comment: str) -> str:
    return " ".join(line.strip().removeprefix("//").strip() for line in comment.splitlines())


def _grpc(calls: dict[str, tuple[str, str, str, dict[str, list[str]]]]) -> Iterator[str]:
    yield "## gRPC\n"
    yield (
        "The package is `redmux.v1`. Beside its services there are gRPC's own for health and for "
        "reflection.\n"
    )
    service, shown = "", set[str]()
    for name, (of, signature, comment, fields) in calls.items():
        if of != service:
            service = of
            yield f"### {of}\n"
        yield f"#### `{name}`\n\n```proto\nrpc {signature};\n```\n"
        if comment:
            yield comment + "\n"
        for message, names in fields.items():
            if names and message not in shown:
                shown.add(message)
                yield f"`{message}`: {_listed(names)}\n"


def client_methods() -> dict[str, Any]:
    """Returns the methods of the client's classes, in their order."""
    classes = (redmux.Client, redmux.Adapters, training.Jobs)
    twins = (redmux.AsyncClient, redmux.AsyncAdapters, training.AsyncJobs)
    found = {}
    for cls, twin in zip(classes, twins, strict=True):
        methods = {name: value for name, value in vars(cls).items() if name[0] != "_"}
        if methods.keys() - vars(twin).keys():
            raise ValueError(f"{twin.__name__} lacks {sorted(methods.keys() - vars(twin).keys())}")
        found |= {f"{cls.__name__}.{name}": method for name, method in methods.items()}
    return found


def _client(methods: dict[str, Any]) -> Iterator[str]:
    yield "## Python\n"
    yield (
        "`redmux.AsyncClient` has the same methods, to be awaited, and iterators that are "
        "asynchronous. `client.adapters` is `Adapters`, `client.jobs` is `Jobs`.\n"
    )
    yield f"### `Client`\n\n{_signature('Client', redmux.Client)}\n\n{_told(redmux.Client)}\n"
    for name, method in methods.items():
        of, _, own = name.partition(".")
        shown = {"Client": "client", "Adapters": "client.adapters", "Jobs": "client.jobs"}[of]
        yield f"### `{name}`\n\n{_signature(f'{shown}.{own}', method)}\n\n{_told(method)}\n"
    yield "### Options of a generation\n"
    yield "Keyword arguments of `generate`, `stream` and `map`; `tokenize` has those from "
    "`parse_special_tokens` on.\n"
    yield "| option | type | |\n|---|---|---|"
    yield from _options()
    yield ""


def _signature(name: str, of: Any) -> str:
    signature = inspect.signature(of)
    kept = [one.replace(annotation=one.empty)
            for one in signature.parameters.values() if one.name != "self"]  # fmt: skip
    text = name + str(inspect.Signature(kept))
    if len(text) > WIDE:
        inner = text[len(name) + 1 : -1].split(", ")
        text = f"{name}(\n" + "".join(f"    {argument},\n" for argument in inner) + ")"
    return f"```python\n{text}\n```"


def _told(of: Any) -> str:
    return inspect.getdoc(of) or ""


def _options() -> Iterator[str]:
    source = inspect.getsource(types)
    source = "".join(
        source.partition(f"class {name}(")[2].partition("\n\n\n")[0]
        for name in ("GenerationOptions", "ChatOptions")
    )
    for name, kind, text in re.findall(r'^    (\w+): (.*?)\n    """(.*?)"""', source, re.M | re.S):
        kind = kind.removesuffix(" | None").replace("|", "\\|")
        yield f"| `{name}` | `{kind}` | {' '.join(text.split())} |"


def _errors() -> Iterator[str]:
    yield "## Errors\n"
    yield (
        "One tree for all three, in the package `redmux`. Over HTTP they have "
        "[OpenAI's body](http.md#errors).\n"
    )
    yield "| class | gRPC | HTTP | |\n|---|---|---:|---|"
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.RedmuxError):
            first = _told(kind).partition("\n\n")[0]
            told = " ".join(first.split()).rstrip(".")
            yield f"| `{kind.__name__}` | {kind.status.name} | {kind.http_status} | {told} |"


def main() -> int:
    """Writes the page, or with --check tells whether it is as it would be written."""
    text = page()
    if sys.argv[1:] == ["--check"]:
        return int(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
