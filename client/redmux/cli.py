"""The `redmux` command: talks to a server, and starts the tools that come with the extras."""

import argparse
import asyncio
import importlib
import json
import os
import sys
from collections.abc import Awaitable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TypedDict

import redmux
from redmux._jobs_command import add_jobs
from redmux._readings import (
    add_classify,
    add_embed,
    classification_json,
    classification_lines,
    embedding_json,
    embedding_lines,
    inputs_of,
    print_answers,
)
from redmux._score_command import add_score
from redmux._shell import shell_line
from redmux._side_by_side import SideBySide
from redmux.aio import AsyncClient
from redmux.client import Client
from redmux.errors import RedmuxError
from redmux.types import Adapter, Classifications, Embeddings, GenerationOptions, Prompt

# Commands whose arguments another package parses: its function for them and the extra it needs.
_SERVE = ("redmux_server.cli", "serve", "server")
_BENCH = ("redmux_bench.cli", "main", "bench")
_TRAIN = ("redmux_adapters.train.cli", "main", "train")
_OFFLINE = ("redmux_adapters.cli", "main", "adapters")
# What a checkout installs for an extra.
_FOLDERS = {
    "server": ". ./adapters ./server",
    "bench": ". ./adapters ./server ./bench",
    "train": ". './adapters[train]'",
    "adapters": ". ./adapters",
}
_OFFLINE_VERBS = {
    "create": "make an adapter from vectors",
    "convert": "make an adapter from another checkpoint",
    "fold": "write a base model with an adapter in its weights",
    "show": "tell what an adapter file holds",
    "verify": "check an adapter file",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0 is success, 1 a failure told in one line on stderr, 2 wrong usage or a missing extra, 130 an
    interruption by Ctrl-C.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        if arguments[:1] == ["serve"]:
            return _run_extra(*_SERVE, arguments[1:])
        if arguments[:1] == ["bench"]:
            return _run_extra(*_BENCH, arguments[1:])
        if arguments[:1] == ["train"]:
            return _run_extra(*_TRAIN, arguments[1:])
        if arguments[:1] == ["adapters"] and arguments[1:2] and arguments[1] in _OFFLINE_VERBS:
            return _run_extra(*_OFFLINE, arguments[1:])
        if arguments in ([], ["adapters"], ["jobs"]):
            arguments = [*arguments, "--help"]
        options = _parser().parse_args(arguments)
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader went away, as `| head` does. Python flushes stdout once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RedmuxError, OSError) as error:
        print(f"redmux: {shell_line(str(error))}", file=sys.stderr)
        return 1


def _run_extra(module: str, function: str, extra: str, argv: list[str]) -> int:
    try:
        return int(getattr(importlib.import_module(module), function)(argv))
    except ModuleNotFoundError as error:
        print(
            f"redmux: this command needs {error.name}, which is not installed; "
            f"pip install 'redmux[{extra}]', or in a checkout: pip install {_FOLDERS[extra]}",
            file=sys.stderr,
        )
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="redmux", description="Serve many RED adapters from one base model, and use them."
    )
    parser.add_argument("--version", action="version", version=f"redmux {redmux.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    server = _server_options()
    commands.add_parser("serve", help="start a server", add_help=False)
    commands.add_parser("bench", help="measure a server and this machine", add_help=False)
    commands.add_parser("train", help="train adapters on a base model", add_help=False)
    _add_generate(commands, server)
    add_classify(commands, server).set_defaults(run=_classify)
    add_embed(commands, server).set_defaults(run=_embed)
    add_score(commands, server, _client)
    _add_adapters(commands, server)
    add_jobs(commands, server, _client)
    info = commands.add_parser("info", parents=[server], help="tell what the server is")
    info.set_defaults(run=_info)
    health = commands.add_parser(
        "health", parents=[server], help="tell whether the server is ready; exit code 1 if not"
    )
    health.set_defaults(run=_health)
    version = commands.add_parser("version", help="tell the version of this client")
    version.set_defaults(run=_version)
    return parser


def _server_options() -> argparse.ArgumentParser:
    """Returns what every command that talks to a server takes."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("server")
    group.add_argument(
        "--target",
        default=os.environ.get("REDMUX_TARGET") or "localhost:50051",
        help="host:port of the server; default: REDMUX_TARGET, or localhost:50051",
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
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    return parser


def _add_generate(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    server: argparse.ArgumentParser,
) -> None:
    parser = commands.add_parser(
        "generate", parents=[server], help="complete a prompt with one or more adapters"
    )
    parser.set_defaults(run=_generate)
    parser.add_argument(
        "prompt", metavar="PROMPT",
        help="the text to complete, sent as it is and begun with the model's BOS token if its "
        "tokenizer has one; - reads stdin",
    )  # fmt: skip
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME",
        help="name or digest; give it again to run several at once; default: the base model",
    )  # fmt: skip
    parser.add_argument("--base", action="store_true", help="run the base model beside --adapter")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's chat message")
    parser.add_argument(
        "--parse-special-tokens", action="store_true",
        help="with --chat: take what is written like a special token for one",
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=int, metavar="N")
    parser.add_argument("--temperature", type=float, metavar="T", help="default: 0, greedy")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--min-p", type=float, metavar="P")
    parser.add_argument("--presence-penalty", type=float, metavar="X")
    parser.add_argument("--frequency-penalty", type=float, metavar="X")
    parser.add_argument("--repetition-penalty", type=float, metavar="X")
    parser.add_argument("--seed", type=int, metavar="N", help="make the draws repeatable")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end at this text; repeatable"
    )
    parser.add_argument(
        "--stop-regex", metavar="PATTERN", help="end where this regular expression first matches"
    )
    parser.add_argument(
        "--stop-token-id", action="append", default=[], type=int, metavar="ID",
        help="end at this token; repeatable",
    )  # fmt: skip
    parser.add_argument("--ignore-eos", action="store_true", help="go on past end-of-text tokens")
    parser.add_argument("--logprobs", action="store_true", help="add log-probabilities to --json")
    parser.add_argument(
        "--top-logprobs", type=int, metavar="N", help="the same, with the N likeliest tokens"
    )
    parser.add_argument(
        "--stream", action=argparse.BooleanOptionalAction, default=True,
        help="print the text as it is decoded; default, but for --json",
    )  # fmt: skip


def _add_adapters(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    server: argparse.ArgumentParser,
) -> None:
    parser = commands.add_parser("adapters", help="list, publish and remove adapters; make files")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    verb = verbs.add_parser("list", parents=[server], help="list all adapters of the server")
    verb.set_defaults(run=_adapters_list)
    verb = verbs.add_parser("get", parents=[server], help="tell about one adapter of the server")
    verb.add_argument("name", metavar="NAME")
    verb.set_defaults(run=_adapters_get)
    verb = verbs.add_parser("put", parents=[server], help="publish an adapter on the server")
    verb.add_argument("name", metavar="NAME")
    verb.add_argument("source", metavar="SOURCE", help="a folder or a .safetensors file")
    verb.add_argument("--config", metavar="FILE", help="adapter_config.json beside a lone file")
    verb.add_argument("--replace", action="store_true", help="replace other content of that name")
    verb.set_defaults(run=_adapters_put)
    verb = verbs.add_parser("delete", parents=[server], help="remove an adapter from the server")
    verb.add_argument("name", metavar="NAME")
    verb.set_defaults(run=_adapters_delete)
    for name, text in _OFFLINE_VERBS.items():
        verbs.add_parser(name, help=text, add_help=False)


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


def _client(options: argparse.Namespace) -> Client:
    return Client(**_connection(options))


def _generate(options: argparse.Namespace) -> int:
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    prompt: Prompt = [{"role": "user", "content": text}] if options.chat else text
    adapters: list[str | None] = list(options.adapter)
    if options.base or not adapters:
        adapters.insert(0, None)
    wanted = GenerationOptions(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        stop=options.stop,
        stop_regex=options.stop_regex,
        stop_token_ids=options.stop_token_id,
        ignore_eos=options.ignore_eos,
        logprobs=options.logprobs or options.top_logprobs is not None,
        top_logprobs=options.top_logprobs,
        parse_special_tokens=options.parse_special_tokens,
    )
    client = AsyncClient(**_connection(options))
    sides = SideBySide(client, prompt, adapters, wanted, options.timeout)
    if options.stream and not options.json:
        return asyncio.run(_closing(client, sides.print_streams()))
    return asyncio.run(_closing(client, sides.print_completions(options.json)))


def _classify(options: argparse.Namespace) -> int:
    inputs = inputs_of(options.texts, options.pairs)
    client = AsyncClient(**_connection(options))
    lines_of = classification_json if options.json else classification_lines

    async def ask(adapter: str | None) -> Classifications:
        return await client.classify(inputs, adapter=adapter or "", timeout_s=options.timeout)

    return asyncio.run(_closing(client, print_answers(options.adapter, ask, lines_of)))


def _embed(options: argparse.Namespace) -> int:
    inputs = inputs_of(options.texts, options.pairs)
    adapters: list[str | None] = list(options.adapter)
    if options.base or not adapters:
        adapters.insert(0, None)
    client = AsyncClient(**_connection(options))
    lines_of = embedding_json if options.json else embedding_lines

    async def ask(adapter: str | None) -> Embeddings:
        return await client.embed(
            inputs, adapter=adapter, pooling=options.pooling, normalize=options.normalize,
            timeout_s=options.timeout,
        )  # fmt: skip

    return asyncio.run(_closing(client, print_answers(adapters, ask, lines_of)))


async def _closing(client: AsyncClient, work: Awaitable[int]) -> int:
    async with client:
        return await work


def _adapters_list(options: argparse.Namespace) -> int:
    with _client(options) as client:
        adapters = list(client.adapters.list())
    if options.json:
        for adapter in adapters:
            _print_json(adapter)
        return 0
    rows = [("NAME", "DIGEST", "BASE", "SITES", "BYTES", "CREATED", "DESCRIPTION")]
    for adapter in adapters:
        digest = adapter.digest[: len("sha256:") + 12]
        created = f"{adapter.created_at:%Y-%m-%d %H:%M}"
        sizes = (str(adapter.num_sites), str(adapter.size_bytes))
        row = (adapter.name, digest, adapter.base_match, *sizes, created, adapter.description)
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print("  ".join(padded).rstrip())
    return 0


def _adapters_get(options: argparse.Namespace) -> int:
    with _client(options) as client:
        return _print_adapter(client.adapters.get(options.name), options.json)


def _adapters_put(options: argparse.Namespace) -> int:
    config = None if options.config is None else Path(options.config).read_text(encoding="utf-8")
    with _client(options) as client:
        adapter = client.adapters.put(
            options.name, options.source, config=config, replace=options.replace
        )
    return _print_adapter(adapter, options.json)


def _adapters_delete(options: argparse.Namespace) -> int:
    with _client(options) as client:
        return _print_adapter(client.adapters.delete(options.name), options.json)


def _info(options: argparse.Namespace) -> int:
    with _client(options) as client:
        info = client.info()
    if options.json:
        print(json.dumps(asdict(info)))
    else:
        _print_fields({**asdict(info), "choices": "; ".join(info.choices)})
    return 0


def _health(options: argparse.Namespace) -> int:
    with _client(options) as client:
        health = client.health()
    print(json.dumps({"health": health}) if options.json else health)
    return 0 if health == "serving" else 1


def _version(options: argparse.Namespace) -> int:
    print(f"redmux {redmux.__version__}")
    return 0


def _print_adapter(adapter: Adapter, as_json: bool) -> int:
    if as_json:
        _print_json(adapter)
    else:
        _print_fields({**asdict(adapter), "created_at": adapter.created_at.isoformat()})
    return 0


def _print_json(adapter: Adapter) -> None:
    print(json.dumps(asdict(adapter), default=datetime.isoformat))


def _print_fields(fields: dict[str, object]) -> None:
    for name, value in fields.items():
        print(f"{name}: {value}")
