"""`redmux classify` and `redmux embed`: texts read with several adapters at once."""

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import TypeVar

from redmux._connecting import run_with_client
from redmux._exit_codes import exit_code
from redmux._shell import shell_line
from redmux.aio import AsyncClient
from redmux.errors import InvalidArgumentError, RedmuxError
from redmux.types import Classifications, Embeddings, TextInput

_Answer = TypeVar("_Answer", Classifications, Embeddings)


def add_classify(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    server: argparse.ArgumentParser,
) -> None:
    """Adds the command that classifies."""
    parser = commands.add_parser(
        "classify", parents=[server], help="classify texts by the heads of one or more adapters"
    )
    _add_texts(parser)
    parser.add_argument(
        "--adapter", action="append", required=True, metavar="NAME",
        help="name or digest; give it again to run several at once",
    )  # fmt: skip
    parser.set_defaults(run=_classify)


def add_embed(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    server: argparse.ArgumentParser,
) -> None:
    """Adds the command that embeds."""
    parser = commands.add_parser(
        "embed", parents=[server], help="turn texts into vectors with one or more adapters"
    )
    _add_texts(parser)
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME",
        help="name or digest; give it again to run several at once; default: the base model",
    )  # fmt: skip
    parser.add_argument("--base", action="store_true", help="run the base model beside --adapter")
    parser.add_argument(
        "--pooling", choices=("mean", "cls", "last"),
        help="default: mean for an encoder, last for a decoder",
    )  # fmt: skip
    parser.add_argument("--normalize", action="store_true", help="scale vectors to length 1")
    parser.set_defaults(run=_embed)


def _add_texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="- reads lines from stdin")
    parser.add_argument("--pairs", action="store_true", help="take texts two by two, as one input")


def _classify(options: argparse.Namespace) -> int:
    inputs = _inputs_of(options.texts, options.pairs)
    lines_of = _classification_json if options.json else _classification_lines

    def run(client: AsyncClient) -> Awaitable[int]:
        def ask(adapter: str | None) -> Awaitable[Classifications]:
            return client.classify(inputs, adapter=adapter or "", timeout_s=options.timeout)

        return _print_answers(options.adapter, ask, lines_of)

    return run_with_client(options, run)


def _embed(options: argparse.Namespace) -> int:
    inputs = _inputs_of(options.texts, options.pairs)
    adapters: list[str | None] = list(options.adapter)
    if options.base or not adapters:
        adapters.insert(0, None)
    lines_of = _embedding_json if options.json else _embedding_lines

    def run(client: AsyncClient) -> Awaitable[int]:
        def ask(adapter: str | None) -> Awaitable[Embeddings]:
            return client.embed(
                inputs, adapter=adapter, pooling=options.pooling, normalize=options.normalize,
                timeout_s=options.timeout,
            )  # fmt: skip

        return _print_answers(adapters, ask, lines_of)

    return run_with_client(options, run)


def _inputs_of(texts: Sequence[str], as_pairs: bool) -> list[TextInput]:
    """Returns the inputs of a command; a text "-" stands for the lines of stdin."""
    found: list[str] = []
    for text in texts:
        found += sys.stdin.read().splitlines() if text == "-" else [text]
    if not as_pairs:
        return list(found)
    if len(found) % 2:
        raise InvalidArgumentError(f"--pairs takes texts two by two; {len(found)} are given")
    return list(zip(found[::2], found[1::2], strict=True))


async def _print_answers(
    adapters: Sequence[str | None],
    ask: Callable[[str | None], Awaitable[_Answer]],
    lines_of: Callable[[_Answer], list[str]],
) -> int:
    """Asks with all adapters at the same time, prints in their order, returns the exit code.

    What fails is reported on stderr and does not disturb the rest.
    """
    answers = await asyncio.gather(*map(ask, adapters), return_exceptions=True)
    code = 0  # of the first that failed
    for adapter, answer in zip(adapters, answers, strict=True):
        title = "(base model)" if adapter is None else adapter
        if isinstance(answer, RedmuxError):
            where = f"{title}: " if len(adapters) > 1 else ""
            print(f"redmux: {where}{shell_line(answer.message)}", file=sys.stderr)
            code = code or exit_code(answer)
        elif isinstance(answer, BaseException):
            raise answer
        else:
            if len(adapters) > 1:
                print(f"== {title} ==")
            print(*lines_of(answer), sep="\n")
    return code


def _classification_lines(answer: Classifications) -> list[str]:
    """Returns a line per input: label and score of the best, of all if several can hold."""
    lines = []
    for result in answer.results:
        pairs = list(zip(result.labels, result.scores, strict=True))
        if answer.problem_type == "single_label":
            pairs = [max(pairs, key=lambda pair: pair[1])]
        lines.append("  ".join(f"{label} {score:.4f}" for label, score in pairs))
    return lines


def _classification_json(answer: Classifications) -> list[str]:
    """Returns a JSON object per input."""
    common = {"problem_type": answer.problem_type, "adapter": answer.adapter}
    return [
        json.dumps({**asdict(result), **common, "digest": answer.digest})
        for result in answer.results
    ]


def _embedding_lines(answer: Embeddings) -> list[str]:
    """Returns a line per input: its numbers."""
    return [" ".join(f"{value:.6g}" for value in vector) for vector in answer.vectors]


def _embedding_json(answer: Embeddings) -> list[str]:
    """Returns a JSON object per input."""
    return [
        json.dumps({"vector": vector, "adapter": answer.adapter, "digest": answer.digest})
        for vector in answer.vectors
    ]
