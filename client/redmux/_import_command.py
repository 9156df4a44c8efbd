"""`redmux adapters import`: a folder of adapter files into a server's registry."""

import argparse
import json
import sys
from pathlib import Path

from redmux._connecting import connect
from redmux.client import Client
from redmux.errors import InvalidArgumentError, RedmuxError

_SUFFIX = ".safetensors"


def add_import(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]", server: argparse.ArgumentParser
) -> None:
    """Adds the verb."""
    verb = verbs.add_parser(
        "import", parents=[server], help="publish every adapter file of a folder under its path"
    )
    verb.add_argument("folder", metavar="DIR", help="team/tone.safetensors becomes team/tone")
    verb.add_argument("--replace", action="store_true", help="replace other content of those names")
    verb.add_argument("--remove", action="store_true", help="remove each file once it is published")
    verb.set_defaults(run=_import)


def _import(options: argparse.Namespace) -> int:
    folder = Path(options.folder)
    if not folder.is_dir():
        raise InvalidArgumentError(f"{folder} is no folder")
    num_bad = num_done = 0
    with connect(options) as client:
        for path in sorted(folder.glob(f"**/*{_SUFFIX}")):
            name = path.relative_to(folder).as_posix().removesuffix(_SUFFIX)
            told: Exception
            try:
                print(_put(client, name, path, options.replace))
            except (RedmuxError, OSError) as err:
                if isinstance(err, RedmuxError) and err.status.name in _ENDS:
                    raise
                told = err
            else:
                num_done += 1
                if options.remove:
                    path.unlink()
                continue
            num_bad += 1
            print(f"redmux: {path}: {told}", file=sys.stderr)
    print(f"{num_done} imported, {num_bad} left", file=sys.stderr)
    return 1 if num_bad else 0


def _put(client: Client, name: str, path: Path, replace: bool) -> str:
    """Publishes a file; returns what to tell of it."""
    data = path.read_bytes()
    if owner := _owner(data):
        raise InvalidArgumentError(f"it belongs to the key {owner}; put it with that key")
    adapter = client.adapters.put(name, data, replace=replace)
    return f"{adapter.name}@{adapter.version} {adapter.digest}"


# What is no fault of one file, so that the next ones need not be tried.
_ENDS = ("UNAVAILABLE", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "INTERNAL")


def _owner(data: bytes) -> str:
    """Returns the owner that an earlier server wrote into a file, "" for none or the operator."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return str(header.get("__metadata__", {}).get("owner", ""))
    except (ValueError, AttributeError, RecursionError):
        return ""  # the server tells what is wrong with it
