"""The `redmux` command: talks to a server, and starts the tools that come with the extras."""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence

import redmux
from redmux._adapters_command import add_adapters
from redmux._chat_command import add_chat
from redmux._connecting import add_json, server_options
from redmux._doctor_command import add_doctor
from redmux._exit_codes import BROKEN_PIPE, INTERRUPTED, USAGE, exit_code
from redmux._generate_command import add_generate
from redmux._jobs_command import add_jobs
from redmux._readings import add_classify, add_embed
from redmux._score_command import add_score
from redmux._server_commands import add_info_and_health
from redmux._shell import shell_line
from redmux._tokens_command import add_tokenize
from redmux._top_command import add_top
from redmux.errors import RedmuxError

# Commands whose arguments another package parses: its function for them and the extra it needs.
_SERVE = ("redmux_server.cli", "serve", "server")
_WARM_UP = ("redmux_server.cli", "warm_up", "server")
_BENCH = ("redmux_bench.cli", "main", "bench")
_COMPLETION = ("redmux._completion_command", "main", "completion")
_TRAIN = ("redmux_adapters.train.cli", "main", "train")
_OFFLINE = ("redmux_adapters.cli", "main", "adapters")
# What a checkout installs for an extra.
_FOLDERS = {
    "server": ". ./adapters ./server",
    "bench": ". ./adapters ./server ./bench",
    "train": ". './adapters[train]'",
    "adapters": ". ./adapters",
    "completion": "'.[completion]'",
}
_OFFLINE_VERBS = {
    "create": "make an adapter from vectors",
    "convert": "make an adapter from another checkpoint",
    "fold": "write a base model with an adapter in its weights",
    "mix": "write several adapters as one",
    "stamp": "write an adapter anew, as made for a base model",
    "pack": "write an adapter as one file with its configuration inside",
    "show": "tell what an adapter file holds",
    "verify": "check an adapter file",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: see `_exit_codes`.

    What fails is one line on stderr.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        if arguments[:1] == ["serve"]:
            return _run_extra(*_SERVE, arguments[1:])
        if arguments[:1] == ["warm-up"]:
            return _run_extra(*_WARM_UP, arguments[1:])
        if arguments[:1] == ["bench"]:
            return _run_extra(*_BENCH, arguments[1:])
        if arguments[:1] == ["train"]:
            return _run_extra(*_TRAIN, arguments[1:])
        if arguments[:1] == ["completion"]:
            return _run_extra(*_COMPLETION, arguments[1:])
        if arguments[:1] == ["adapters"] and arguments[1:2] and arguments[1] in _OFFLINE_VERBS:
            return _run_extra(*_OFFLINE, arguments[1:])
        if arguments in ([], ["adapters"], ["jobs"]):
            arguments = [*arguments, "--help"]
        options = command_parser().parse_args(arguments)
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away, as `| head` does. Python flushes stdout once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (RedmuxError, OSError, UnicodeDecodeError) as error:
        print(f"redmux: {shell_line(_told(error))}", file=sys.stderr)
        return exit_code(error)


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot open {error.filename}: {error.strerror}"
    return str(error)


def _run_extra(module: str, function: str, extra: str, argv: list[str]) -> int:
    try:
        return int(getattr(importlib.import_module(module), function)(argv))
    except ModuleNotFoundError as error:
        print(
            f"redmux: this command needs {error.name}, which is not installed; "
            f"pip install 'redmux[{extra}]', or in a checkout: pip install {_FOLDERS[extra]}",
            file=sys.stderr,
        )
        return USAGE


def command_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands; those of the extras are names without options."""
    parser = argparse.ArgumentParser(
        prog="redmux", description="Serve many RED adapters from one base model, and use them."
    )
    parser.add_argument("--version", action="version", version=f"redmux {redmux.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    server = server_options()
    reading = argparse.ArgumentParser(add_help=False, parents=[server])
    add_json(reading)
    commands.add_parser("serve", help="start a server", add_help=False)
    commands.add_parser(
        "warm-up", help="convert and compile what a server's first start would", add_help=False
    )
    commands.add_parser("bench", help="measure a server and this machine", add_help=False)
    commands.add_parser("train", help="train adapters on a base model", add_help=False)
    add_generate(commands, reading)
    add_chat(commands, server)
    add_classify(commands, reading)
    add_embed(commands, reading)
    add_score(commands, reading)
    add_tokenize(commands, reading)
    add_adapters(commands, reading, _OFFLINE_VERBS)
    add_jobs(commands, reading)
    add_info_and_health(commands, reading)
    add_top(commands, reading)
    add_doctor(commands, reading)
    commands.add_parser(
        "completion", help="print a script that completes commands in a shell", add_help=False
    )
    version = commands.add_parser("version", help="tell the version of this client")
    add_json(version)
    version.set_defaults(run=_version)
    return parser


def _version(options: argparse.Namespace) -> int:
    version = redmux.__version__
    print(json.dumps({"version": version}) if options.json else f"redmux {version}")
    return 0
