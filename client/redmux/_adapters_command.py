"""`redmux adapters`: the adapters of a server."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from redmux._connecting import connect
from redmux._printing import json_line, print_fields, print_table
from redmux.types import Adapter


def add_adapters(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    server: argparse.ArgumentParser,
    offline: Mapping[str, str],
) -> "argparse._SubParsersAction[argparse.ArgumentParser]":
    """Adds the command and returns its verbs; those of `offline` are run by another package."""
    parser = commands.add_parser("adapters", help="list, publish and remove adapters; make files")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    verb = verbs.add_parser("list", parents=[server], help="list all adapters of the server")
    verb.set_defaults(run=_list)
    verb = verbs.add_parser("get", parents=[server], help="tell about one adapter of the server")
    verb.add_argument("name", metavar="NAME")
    verb.set_defaults(run=_get)
    verb = verbs.add_parser("put", parents=[server], help="publish an adapter on the server")
    verb.add_argument("name", metavar="NAME")
    verb.add_argument("source", metavar="SOURCE", help="a folder or a .safetensors file")
    verb.add_argument("--config", metavar="FILE", help="adapter_config.json beside a lone file")
    verb.add_argument("--replace", action="store_true", help="replace other content of that name")
    verb.set_defaults(run=_put)
    verb = verbs.add_parser("delete", parents=[server], help="remove an adapter from the server")
    verb.add_argument("name", metavar="NAME")
    verb.set_defaults(run=_delete)
    for name, text in offline.items():
        verbs.add_parser(name, help=text, add_help=False)
    return verbs


def _list(options: argparse.Namespace) -> int:
    with connect(options) as client:
        if options.json:
            for adapter in client.adapters:
                print(json_line(adapter))
            return 0
        adapters = list(client.adapters)
    rows = [("NAME", "DIGEST", "BASE", "SITES", "BYTES", "CREATED", "DESCRIPTION")]
    for adapter in adapters:
        digest = adapter.digest[: len("sha256:") + 12]
        created = f"{adapter.created_at:%Y-%m-%d %H:%M}"
        sizes = (str(adapter.num_sites), str(adapter.size_bytes))
        row = (adapter.name, digest, adapter.base_match, *sizes, created, adapter.description)
        rows.append(row)
    print_table(rows)
    return 0


def _get(options: argparse.Namespace) -> int:
    with connect(options) as client:
        return _print(client.adapters.get(options.name), options.json)


def _put(options: argparse.Namespace) -> int:
    config = None if options.config is None else Path(options.config).read_text(encoding="utf-8")
    with connect(options) as client:
        adapter = client.adapters.put(
            options.name, options.source, config=config, replace=options.replace
        )
    return _print(adapter, options.json)


def _delete(options: argparse.Namespace) -> int:
    with connect(options) as client:
        return _print(client.adapters.delete(options.name), options.json)


def _print(adapter: Adapter, as_json: bool) -> int:
    if as_json:
        print(json_line(adapter))
    else:
        print_fields({**asdict(adapter), "created_at": adapter.created_at.isoformat()})
    return 0
