"""ServerConfig: everything that can be set, from flags, REDMUX_* variables or a TOML file."""

import argparse
import dataclasses
import difflib
import ipaddress
import logging
import os
import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redmux.errors import InvalidArgumentError
from redmux_server.keys import check_keys

logger = logging.getLogger(__name__)


def _option(default: object, text: str, *, is_secret: bool = False) -> Any:
    return dataclasses.field(default=default, metadata={"help": text}, repr=not is_secret)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The complete configuration of a server; never changed after construction.

    Each field is a flag (`max_queue` is --max-queue), a variable (REDMUX_MAX_QUEUE) and a key of
    the config file; the flag wins over the variable, the variable over the file.
    """

    model: str = _option("smollm2", "smollm2, a folder, a .gguf file or a hub id")
    tokenizer: str = _option(
        "", "folder or hub id of a tokenizer to use instead of the model's own"
    )
    host: str = _option("127.0.0.1", "address to listen on")
    port: int = _option(50051, "port of gRPC; 0 picks a free one")
    http_port: int = _option(8000, "port of HTTP; 0 picks a free one, -1 is none")
    served_model_name: tuple[str, ...] = _option(
        (), "further names of the base model in requests over HTTP, the first one shown in lists"
    )
    http_cors_origin: tuple[str, ...] = _option(
        (), "origins whose pages a browser lets use HTTP, such as https://example.org; * is all"
    )
    load_dir: str = _option(
        "", "folder whose adapters the operator may load by their paths, over HTTP"
    )
    metrics_port: int = _option(9095, "port of /metrics; 0 picks a free one")
    socket: str = _option(
        "", "unix socket to listen on as well, without TLS: for probes and callers on this machine"
    )
    device: str = _option("auto", "auto, cpu or cuda")
    dtype: str = _option("auto", "auto, float32, bfloat16 or float16")
    quantization: str = _option(
        "none", "none, bf16, int8, int4 or auto: how linears on a CPU are multiplied"
    )
    kv_dtype: str = _option(
        "auto",
        "auto, float32 or bfloat16: how a CPU keeps keys and values; auto is bfloat16 where "
        "products are quantized",
    )
    threads: int = _option(0, "CPU threads of the engine; 0 takes every core")
    max_running: int = _option(64, "most requests in one forward pass")
    max_batch_tokens: int = _option(256, "most tokens in one forward pass")
    max_queue: int = _option(
        512, "most requests that wait; an eighth of all places is kept for other tenants"
    )
    max_context: int = _option(0, "most tokens of prompt and completion; 0 is the model's limit")
    kv_cache_tokens: int = _option(0, "size of the key/value cache in tokens; 0 fits the memory")
    prefix_cache: bool = _option(
        True, "true or false: whether prompts that begin alike share their computed beginning"
    )
    prefix_cache_bytes: int = _option(
        0,
        "memory for computed beginnings that no running request uses; 0 is 128 MiB on a CPU and "
        "the whole key/value cache on a GPU, where that is taken at start",
    )
    drafts: str = _option(
        "auto",
        "auto or off: whether tokens that are likely to come are computed beside the newest one, "
        "where results do not depend on the batch; no token changes by it",
    )
    bank_bytes: int = _option(256 << 20, "memory for the vectors of adapters in use")
    host_cache_bytes: int = _option(
        256 << 20,
        "memory for the vectors of adapters that were used last, beside those in use",
    )
    adapters: tuple[str, ...] = _option(
        (), "adapters to load at start: files or folders, NAME=PATH to name them, or zoo"
    )
    adapter_dir: str = _option(
        "", "folder whose adapter files are served, as they come, change and go; it is only read"
    )
    data_dir: str = _option(
        "",
        "folder that keeps the registry of adapters, files, batches and fine-tuning jobs; empty "
        "keeps them in memory",
    )
    registry: str = _option(
        "",
        "URL of a PostgreSQL database that keeps the registry of adapters instead of data_dir, "
        "postgresql+psycopg://USER@HOST/DATABASE; prefer REDMUX_REGISTRY where it has a password",
        is_secret=True,
    )
    allow_other_base: bool = _option(
        False,
        "true or false: whether adapters are taken that were made for other weights or another "
        "vocabulary of the same architecture and size, such as those of a relative",
    )
    allow_request_template: bool = _option(
        False,
        "true or false: whether requests may bring chat templates, which run in a sandbox: for "
        "callers who are trusted not to use up its memory",
    )
    training: bool = _option(True, "true or false: whether TrainingService takes jobs")
    training_share: float = _option(
        0.25, "share of the time that training runs while requests do, above 0, up to 1"
    )
    training_queue: int = _option(8, "most training jobs of one API key that wait")
    training_max_tokens: int = _option(20_000_000, "most tokens that one training job computes")
    api_keys: tuple[str, ...] = _option(
        (),
        "API keys that are let in; none lets everybody in. Lists of processes show flags, so "
        "prefer REDMUX_API_KEYS or api_keys_file",
        is_secret=True,
    )
    api_keys_file: str = _option(
        "", "file of further API keys, one a line, lines with # left out; SIGHUP reads it again"
    )
    admin_key: str = _option(
        "",
        "API key that sees and changes the adapters of all keys; it is let in, too",
        is_secret=True,
    )
    insecure: bool = _option(
        False, "true or false: whether everybody may be served on a host that others reach"
    )
    tls_cert: str = _option("", "PEM file with the certificate chain")
    tls_key: str = _option("", "PEM file with the private key")
    drain_s: float = _option(30.0, "seconds that running requests get at shutdown")
    log_level: str = _option("info", "debug, info, warning or error")

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:  # true for NaN, too
                raise InvalidArgumentError(f"{name} is {value}, must be from {low} to {high}")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InvalidArgumentError(f"{name} is {value!r}, must be one of {allowed}")
        if self.max_batch_tokens < self.max_running:
            raise InvalidArgumentError(
                f"max_batch_tokens is {self.max_batch_tokens}, must be at least max_running "
                f"({self.max_running})"
            )
        if bool(self.tls_cert) != bool(self.tls_key):
            raise InvalidArgumentError("tls_cert and tls_key must be given together")
        if not all(self.api_keys):
            raise InvalidArgumentError("api_keys has an empty key; leave it out")
        if not (self.has_keys or self.insecure or self.is_local):
            raise InvalidArgumentError(
                f"host is {self.host!r}, where others reach it, and without API keys everybody "
                "would be served; set api_keys_file, api_keys or admin_key, or insecure to mean it"
            )

    @property
    def has_keys(self) -> bool:
        """Whether callers need an API key."""
        return bool(self.api_keys or self.api_keys_file or self.admin_key)

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches `host`."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host == "localhost"


_TOKENS = 1 << 24  # more than any model reads, or a step computes
_CALLS = 1 << 20
_BYTES = 1 << 50
# What is more than these would be a slip, which shows itself as a start that hangs or dies.
_RANGES = {
    "port": (0, 65535), "http_port": (-1, 65535), "metrics_port": (0, 65535),
    "threads": (0, 1024),
    "max_running": (1, 1 << 16), "max_batch_tokens": (1, _TOKENS), "max_queue": (0, _CALLS),
    "max_context": (0, _TOKENS), "kv_cache_tokens": (0, 1 << 40), "prefix_cache_bytes": (0, _BYTES),
    "bank_bytes": (0, _BYTES), "host_cache_bytes": (0, _BYTES), "training_share": (0.001, 1),
    "training_queue": (1, _CALLS), "training_max_tokens": (1, _BYTES),
    "drain_s": (0, 7 * 86_400),
}  # fmt: skip
_CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "quantization": ("none", "bf16", "int8", "int4", "auto"),
    "kv_dtype": ("auto", "float32", "bfloat16"),
    "drafts": ("auto", "off"),
    "log_level": ("debug", "info", "warning", "error"),
}


def load_config(
    argv: Sequence[str], environ: Mapping[str, str] = os.environ, prog: str = "redmux serve"
) -> ServerConfig:
    """Returns the configuration that flags, environment and --config FILE give together.

    Raises InvalidArgumentError for an unknown key of the file and for a value that does not parse
    or would open the server in silence, naming where it came from; argparse exits with 2 for
    unknown flags. An unknown variable is a warning: another version may know it.
    """
    fields = {f.name: f for f in dataclasses.fields(ServerConfig)}
    flags = vars(option_parser(prog).parse_args(argv))
    file = flags.pop("config") or environ.get("REDMUX_CONFIG")
    values = _from_file(Path(file), fields) if file else {}
    values |= _from_environment(environ, fields)
    for name, text in flags.items():
        if text is not None:
            flag = f"--{name.replace('_', '-')}"
            value = tuple(text) if _is_list(name) else _parse(name, text, flag)
            values[name] = _guarded(name, value, flag)
    config = ServerConfig(**values)
    if "REDMUX_API_KEY" in environ and not (config.has_keys or config.insecure):
        raise InvalidArgumentError(
            "REDMUX_API_KEY is set, which is the key of a client, and the server has none: "
            "everybody would be served; set REDMUX_API_KEYS, or insecure to mean it"
        )
    return config


def option_parser(prog: str = "redmux serve") -> argparse.ArgumentParser:
    """Returns the parser of the flags; what is not given is None."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Serve RED adapters over gRPC and HTTP.", allow_abbrev=False
    )
    parser.add_argument("--config", help="TOML file with any of these options")
    for field in dataclasses.fields(ServerConfig):
        name = field.name
        kind = " (repeatable)" if _is_list(name) else ""
        default = _default_text(field.default)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            action="append" if _is_list(name) else "store",
            metavar=name.upper(),
            help=f"{field.metadata['help']}{kind}; default: {default}",
            nargs="?" if field.type is bool else None,
            const="true" if field.type is bool else None,
        )
    return parser


_SECRETS = {"admin_key", "api_keys"}
# What guards the door: given without a value, it would be open in silence.
_GUARDS = {"admin_key", "api_keys", "api_keys_file", "tls_cert", "tls_key"}


def _guarded(name: str, value: Any, source: str) -> Any:
    if name in _SECRETS:
        check_keys(value if name == "api_keys" else (value,), source)
    if name in _GUARDS and not value:
        raise InvalidArgumentError(f"{source} is empty; give a value or leave it out")
    return value


_BOOLS = {"true": True, "false": False}


def _default_text(default: object) -> str:
    if default in ("", ()):
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(default)


def _is_list(name: str) -> bool:
    return typing.get_origin(typing.get_type_hints(ServerConfig)[name]) is tuple


def _parse(name: str, text: str, source: str) -> Any:
    kind = typing.get_type_hints(ServerConfig)[name]
    if _is_list(name):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind is bool:
        if text not in _BOOLS:
            raise InvalidArgumentError(f"{source} is {text!r}, must be true or false")
        return _BOOLS[text]
    try:
        return kind(text)
    except ValueError:
        raise InvalidArgumentError(
            f"{source} is {text!r}, must be a number ({kind.__name__})"
        ) from None


# Variables of the client and of the model cache, which share the prefix.
_OTHER_VARIABLES = {"REDMUX_CONFIG", "REDMUX_CACHE", "REDMUX_TARGET", "REDMUX_API_KEY"}
# What Kubernetes tells every pod about Services called redmux or redmux-..., as Docker's links did.
_SERVICE_LINK = re.compile(
    r"REDMUX_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://")


def _is_service_link(variable: str, text: str) -> bool:
    is_url = variable.endswith("_PORT") and _SERVICE_URL.match(text) is not None
    return is_url or _SERVICE_LINK.fullmatch(variable) is not None


def _from_environment(environ: Mapping[str, str], fields: Mapping[str, Any]) -> dict[str, Any]:
    values = {}
    for variable, text in environ.items():
        if not variable.startswith("REDMUX_") or variable in _OTHER_VARIABLES:
            continue
        if _is_service_link(variable, text):
            continue
        name = variable.removeprefix("REDMUX_").lower()
        if name in fields:
            values[name] = _guarded(name, _parse(name, text, variable), variable)
            continue
        near = difflib.get_close_matches(name, fields, n=1)
        hint = f"; did you mean REDMUX_{near[0].upper()}?" if near else ""
        logger.warning("unknown environment variable %s has no effect%s", variable, hint)
    return values


def _from_file(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:  # ValueError: no TOML, no text, a number
        raise InvalidArgumentError(f"cannot read config file {path}: {err}") from err
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name not in fields:
            raise InvalidArgumentError(f"{path}: unknown option {name!r}")
        kind = typing.get_type_hints(ServerConfig)[name]
        if _is_list(name):
            ok = isinstance(value, list) and all(isinstance(v, str) for v in value)
            value = tuple(value) if ok else value
        elif kind is float and type(value) is int:
            value, ok = float(value), True
        else:
            ok = type(value) is kind
        if not ok:
            shown = "" if name in _SECRETS else f" {value!r},"
            raise InvalidArgumentError(f"{path}: {name} is{shown} must be {_kind_name(name)}")
        values[name] = _guarded(name, value, f"{name} of {path}")
    return values


def _kind_name(name: str) -> str:
    kind = typing.get_type_hints(ServerConfig)[name]
    return "a list of strings" if _is_list(name) else f"of type {kind.__name__}"
