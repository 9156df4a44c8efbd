"""`redmux info` and `redmux health`: what a server is, and whether it serves."""

import argparse
import json
from dataclasses import asdict

from redmux._connecting import connect
from redmux._exit_codes import FAILED
from redmux._printing import json_line, print_fields


def add_info_and_health(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    server: argparse.ArgumentParser,
) -> None:
    """Adds the commands; `server` has the options of the connection."""
    info = commands.add_parser("info", parents=[server], help="tell what the server is")
    info.set_defaults(run=_info)
    health = commands.add_parser(
        "health", parents=[server], help="tell whether the server is ready; exit code 1 if not"
    )
    health.set_defaults(run=_health)


def _info(options: argparse.Namespace) -> int:
    with connect(options) as client:
        info = client.info()
    if options.json:
        print(json_line(info))
        return 0
    fields = asdict(info) | {"choices": "; ".join(info.choices)}
    del fields["load"]  # `redmux top` tells it
    print_fields(fields)
    return 0


def _health(options: argparse.Namespace) -> int:
    with connect(options) as client:
        health = client.health()
    print(json.dumps({"health": health}) if options.json else health)
    return 0 if health == "serving" else FAILED
