"""What every command that talks to a server takes, and the clients made of it."""

import argparse
import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypedDict

from redmux.aio import AsyncClient
from redmux.client import Client

DEFAULT_TARGET = "localhost:50051"


def default_target() -> str:
    """Returns the target of a command that is given none."""
    return os.environ.get("REDMUX_TARGET") or DEFAULT_TARGET


def server_options() -> argparse.ArgumentParser:
    """Returns what every command that talks to a server takes."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("server")
    group.add_argument(
        "--target",
        default=default_target(),
        help=f"host:port of the server; default: REDMUX_TARGET, or {DEFAULT_TARGET}",
    )
    group.add_argument(
        "--api-key",
        default=os.environ.get("REDMUX_API_KEY") or None,
        metavar="KEY",
        help="default: REDMUX_API_KEY, which other users of the machine cannot see",
    )
    group.add_argument("--tls", action="store_true", help="use TLS and the system's authorities")
    group.add_argument(
        "--ca", metavar="FILE", help="use TLS and the certificate authorities in a PEM file"
    )
    group.add_argument("--timeout", type=float, metavar="SECONDS", help="limit of every call")
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds --json; what it prints is promised in docs/command.md."""
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")


class _Connection(TypedDict):
    """What both clients take."""

    target: str
    api_key: str | None
    tls: bool
    root_certificates: bytes | None
    timeout_s: float


def _connection(options: argparse.Namespace) -> _Connection:
    return _Connection(
        target=options.target,
        api_key=options.api_key,
        tls=options.tls or options.ca is not None,
        root_certificates=None if options.ca is None else Path(options.ca).read_bytes(),
        timeout_s=60.0 if options.timeout is None else options.timeout,
    )


def connect(options: argparse.Namespace) -> Client:
    """Returns a client of the server that the options name."""
    return Client(**_connection(options))


def run_with_client(
    options: argparse.Namespace, work: Callable[[AsyncClient], Awaitable[int]]
) -> int:
    """Runs asynchronous work with a client of the server that the options name."""

    async def run() -> int:
        async with AsyncClient(**_connection(options)) as client:
            return await work(client)

    return asyncio.run(run())
