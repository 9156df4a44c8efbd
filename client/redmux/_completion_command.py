"""`redmux completion`: a script by which a shell completes commands and options."""

import argparse
import importlib
from collections.abc import Sequence

import shtab

from redmux.cli import command_parser

# Commands whose options another package knows: where its parser is made.
_PARSERS = {
    "serve": ("redmux_server.config", "option_parser"),
    "warm-up": ("redmux_server.config", "option_parser"),
    "bench": ("redmux_bench.cli", "command_parser"),
    "train": ("redmux_adapters.train.command_line", "option_parser"),
}
_OFFLINE = ("redmux_adapters.cli", "command_parser")
_WHERE = {
    "bash": "redmux completion bash > ~/.local/share/bash-completion/completions/redmux",
    "zsh": "redmux completion zsh > _redmux, in a folder of $fpath",
    "fish": "redmux completion fish > ~/.config/fish/completions/redmux.fish",
}


def main(argv: Sequence[str]) -> int:
    """Prints the script for a shell and returns 0."""
    shell = _own_parser().parse_args(argv).shell
    print(shtab.complete(whole_parser(), shell=shell))
    return 0


def _own_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="redmux completion", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Print a script that completes commands and options, with those of the extras "
        "that are installed.",
        epilog="To use it from the next shell on:\n  " + "\n  ".join(_WHERE.values()),
    )  # fmt: skip
    parser.add_argument("shell", choices=tuple(_WHERE))
    return parser


def whole_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command with those of the extras that are installed."""
    parser = command_parser()
    commands = _choices(parser)
    commands["completion"] = _own_parser()
    for name, (module, function) in _PARSERS.items():
        found = _made(module, function)
        if found is not None:
            commands[name] = found
    offline = _made(*_OFFLINE)
    if offline is not None:
        _choices(commands["adapters"]).update(_choices(offline))
    return parser


def _made(module: str, function: str) -> argparse.ArgumentParser | None:
    try:
        parser: argparse.ArgumentParser = getattr(importlib.import_module(module), function)()
    except ModuleNotFoundError:
        return None
    return parser


def _choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Returns the parsers of the commands of a parser, to be changed in place."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            choices: dict[str, argparse.ArgumentParser] = action.choices
            return choices
    raise ValueError(f"{parser.prog} has no commands")
