"""`redmux doctor`: what this machine gives, what is missing, what to do."""

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict

from redmux._checks import Check, machine_checks
from redmux._connecting import DEFAULT_TARGET, connect
from redmux._exit_codes import FAILED
from redmux._machine import Machine
from redmux._serving_checks import server_check, serving_checks

_TIMEOUT_S = 1.0


def add_doctor(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    server: argparse.ArgumentParser,
) -> None:
    """Adds the command; `server` has the options of the connection and --json."""
    parser = commands.add_parser(
        "doctor", parents=[server],
        help="tell what this machine gives, what is missing and what to do; exit code 1 if it "
        "cannot serve",
    )  # fmt: skip
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    checks = list(_checks(options))
    num_blocks = sum(check.state == "blocks" for check in checks)
    if options.json:
        print(json.dumps({"ok": not num_blocks, "checks": [asdict(check) for check in checks]}))
    else:
        for check in checks:
            print(f"{check.state:<8} {check.name:<12} {check.found}")
            if check.remedy:
                print(f"{'':<8} {'':<12} -> {check.remedy}")
        print(_verdict(num_blocks))
    return FAILED if num_blocks else 0


def _checks(options: argparse.Namespace) -> Iterator[Check]:
    yield from machine_checks(Machine())
    yield from serving_checks(os.environ)
    options.timeout = options.timeout or _TIMEOUT_S
    with connect(options) as client:
        yield server_check(client, options.target, is_meant=options.target != DEFAULT_TARGET)


def _verdict(num_blocks: int) -> str:
    if not num_blocks:
        return "nothing stands in the way of `redmux serve`"
    things = "one thing stands" if num_blocks == 1 else f"{num_blocks} things stand"
    return f"{things} in the way of `redmux serve`"
