"""`redmux adapters`: the adapters of a server."""

import argparse
import errno
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from redmux._connecting import connect
from redmux._import_command import add_import
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
    verb = verbs.add_parser("delete", parents=[server], help="remove a name, or one version of it")
    verb.add_argument("name", metavar="NAME[@VERSION]")
    verb.set_defaults(run=_delete)
    verb = verbs.add_parser("versions", parents=[server], help="list the versions of a name")
    verb.add_argument("name", metavar="NAME")
    verb.set_defaults(run=_versions)
    verb = verbs.add_parser("download", parents=[server], help="save the file of an adapter")
    verb.add_argument("name", metavar="NAME[@VERSION]")
    verb.add_argument("file", metavar="FILE", help="a .safetensors file that is not there yet")
    verb.set_defaults(run=_download)
    verb = verbs.add_parser("alias", parents=[server], help="point an alias at a version")
    verb.add_argument("name", metavar="NAME")
    verb.add_argument("alias", metavar="ALIAS")
    verb.add_argument("version", metavar="VERSION", help="such as 3, latest, or another alias")
    verb.set_defaults(run=_alias)
    verb = verbs.add_parser("unalias", parents=[server], help="remove an alias")
    verb.add_argument("name", metavar="NAME")
    verb.add_argument("alias", metavar="ALIAS")
    verb.set_defaults(run=_unalias)
    add_import(verbs, server)
    for name, text in offline.items():
        verbs.add_parser(name, help=text, add_help=False)
    return verbs


def _list(options: argparse.Namespace) -> int:
    with connect(options) as client:
        if options.json:
            for adapter in client.adapters:
                print(json_line(adapter))
            return 0
        _print_all(client.adapters)
    return 0


def _versions(options: argparse.Namespace) -> int:
    with connect(options) as client:
        if options.json:
            for adapter in client.adapters.list(options.name):
                print(json_line(adapter))
            return 0
        _print_all(client.adapters.list(options.name))
    return 0


def _print_all(adapters: Iterable[Adapter]) -> None:
    header = ("NAME", "VERSION", "ALIASES", "DIGEST", "BASE", "SITES", "BYTES", "CREATED")
    rows = [(*header, "DESCRIPTION")]
    for adapter in adapters:
        digest = adapter.digest[: len("sha256:") + 12]
        created = f"{adapter.created_at:%Y-%m-%d %H:%M}"
        sizes = (str(adapter.num_sites), str(adapter.size_bytes))
        version = str(adapter.version) if adapter.version else "-"
        aliases = [a.name if a.version == adapter.version else f"{a.name}={a.version}"
                   for a in adapter.aliases]  # fmt: skip
        row = (adapter.name, version, ",".join(aliases) or "-", digest, adapter.base_match, *sizes)
        rows.append((*row, created, adapter.description))
    print_table(rows)


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


def _download(options: argparse.Namespace) -> int:
    path = Path(options.file)
    if path.exists():  # before anything is asked for
        raise FileExistsError(errno.EEXIST, "is there already", str(path))
    with connect(options) as client:
        data = client.adapters.download(options.name)
    with path.open("xb") as file:
        file.write(data)
    return 0


def _alias(options: argparse.Namespace) -> int:
    with connect(options) as client:
        adapter = client.adapters.set_alias(options.name, options.alias, options.version)
    return _print(adapter, options.json)


def _unalias(options: argparse.Namespace) -> int:
    with connect(options) as client:
        client.adapters.delete_alias(options.name, options.alias)
    return 0


def _print(adapter: Adapter, as_json: bool) -> int:
    if as_json:
        print(json_line(adapter))
    else:
        aliases = ", ".join(f"{alias.name}={alias.version}" for alias in adapter.aliases)
        created_at = adapter.created_at.isoformat()
        print_fields({**asdict(adapter), "created_at": created_at, "aliases": aliases})
    return 0
