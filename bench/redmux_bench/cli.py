"""`redmux bench`: what the commands take. Each is run by the module named beside it."""

import argparse
import importlib
import os
import shlex
from collections.abc import Callable, Sequence
from typing import TypeAlias

from redmux_bench.option_values import (
    count,
    file,
    lengths,
    named_path,
    points,
    positive,
    positive_float,
    positive_floats,
    positive_list,
    precisions,
    sweep_counts,
)

_Parser: TypeAlias = argparse.ArgumentParser


def main(argv: Sequence[str]) -> int:
    """Runs one benchmark; returns 0, or 1 if it got no result."""
    options = command_parser().parse_args(argv)
    options.command_line = shlex.join(["redmux", "bench", *argv])
    # torch and transformers take seconds to import: mistakes and --help answer first.
    code: int = importlib.import_module(f"redmux_bench.{options.module}").run(options)
    return code


def command_parser() -> _Parser:
    """Returns the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="redmux bench",
        description="Measure a redmux server. What each command measures, and what it does not: "
        "docs/benchmarks.md.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    common, server = _common(), _server()
    load = [server, _load(), common]
    elsewhere = [_target(), *load]

    for name, module, add_options, parents, text in (
        ("serve", "serve", _serve, elsewhere,
         "send a load to a server and report rates and latencies"),
        ("sweep", "sweep", _sweep, elsewhere, "throughput with K distinct adapters against none"),
        ("load", "loading", _loading, load, "what putting, holding and loading adapters takes"),
        ("floor", "floor", _floor, [server, common],
         "the engine's steps against what this machine allows"),
        ("products", "products", _products, [common],
         "the matrix products of all layers, alone"),
        ("startup", "ready", _startup, [server, common],
         "time until a server is ready, at the first start and later"),
        ("engine", "engine", _engine, load,
         "the engine alone against the same load over gRPC and HTTP"),
        ("constrained", "constrained", _constrained, load,
         "what requests with a grammar cost the others of their batch"),
        ("drafts", "drafts", _drafts, [server, common],
         "adapters' answers to their test texts with drafts against without"),
        ("nlg", "nlg", _nlg, [common], "score generated texts as the E2E NLG challenge does"),
        ("train", "training", _train, [common],
         "adapters trained together against one after the other"),
        ("jobs", "jobs", _jobs, elsewhere,
         "latencies while the server trains, against those alone"),
    ):  # fmt: skip
        command = commands.add_parser(name, parents=parents, help=text)
        command.set_defaults(module=module)
        add_options(command)
    return parser


def _serve(parser: _Parser) -> None:
    _add(
        parser, "--concurrency", positive_list, "32",
        "requests that are open at a time; several are measured one after the other", "N,N,...",
    )  # fmt: skip
    parser.add_argument(
        "--rate", type=positive_floats, metavar="R,R,...",
        help="Poisson arrivals per second instead, however many are open",
    )  # fmt: skip
    _add(parser, "--num-requests", positive, 128, "requests that are measured, of each load")
    _add(parser, "--adapters", count, 0, "put this many random adapters first, 0 is the base model")
    parser.add_argument(
        "--assignment", choices=("distinct", "uniform", "zipf"), default="distinct",
        help="adapters of the requests: in turn, or drawn; default: distinct",
    )  # fmt: skip
    _add(
        parser, "--zipf-exponent", positive_float, 1.0, "S: adapter k comes in proportion to k**-S"
    )
    parser.add_argument(
        "--ignore-eos", action=argparse.BooleanOptionalAction, default=True,
        help="generate past end-of-text tokens, to the length asked for; default",
    )  # fmt: skip
    parser.add_argument("--plot", type=file, metavar="FILE", help="draw latencies against the load")


def _sweep(parser: _Parser) -> None:
    _add(
        parser, "--adapters", sweep_counts, "0,1,8,32,64,128,256",
        "numbers of adapters, 0 among them", "K,K,...",
    )  # fmt: skip
    _add(parser, "--concurrency", positive, 64, "requests that are open at a time")
    _add_rounds(parser, 3)
    parser.add_argument(
        "--plot", type=file, metavar="FILE", help="draw throughput against K into a PNG"
    )


def _loading(parser: _Parser) -> None:
    _add(parser, "--samples", positive, 20, "puts, and resident requests, in each state")
    _add(parser, "--streams", positive, 16, "background streams of the loaded state")
    _add(parser, "--registered", count, 0, "measure with this many adapters registered, too")
    parser.add_argument(
        "--startup", action="store_true", help="measure the start with a registry of those, too"
    )
    _add(parser, "--concurrency", positive, 32, "requests at a time, for --registered")
    _add_rounds(parser, 3)


def _floor(parser: _Parser) -> None:
    _add(
        parser, "--points", points, "1:128,8:128,32:128,32:1024",
        "decode steps to time", "BATCH:CONTEXT,...",
    )  # fmt: skip
    _add(parser, "--prefill-tokens", count, 512, "length of the prompt to prefill; 0 is none")
    _add(parser, "--chunk", positive, 256, "tokens per prefill step, as --max-batch-tokens")
    _add(parser, "--seed", count, 0, "of everything that is drawn")
    _add_rounds(parser, 15)


def _products(parser: _Parser) -> None:
    parser.add_argument("--model", help="a folder or name whose shapes to take; default: smollm2")
    _add(parser, "--rows", positive_list, "1,8,32,64,256", "rows of a step", "N,N,...")
    _add(parser, "--precision", precisions, "fp32,int8", "fp32, int8, int4 or bf16", "P,P,...")
    parser.add_argument(
        "--unaligned", action="store_true",
        help="measure the same arrays 16 bytes behind a cache line, too, in turn",
    )  # fmt: skip
    _add(parser, "--threads", count, 0, "that compute; 0 takes every core")
    _add_rounds(parser, 9)


def _startup(parser: _Parser) -> None:
    _add_rounds(parser, 3)


def _engine(parser: _Parser) -> None:
    _add(parser, "--concurrency", positive, 32, "requests per wave, all at once")
    _add_rounds(parser, 5)


def _constrained(parser: _Parser) -> None:
    _add(
        parser, "--concurrency", positive, 32,
        "requests per wave, all at once, of which every second one has a grammar",
    )  # fmt: skip
    _add_rounds(parser, 5)


def _drafts(parser: _Parser) -> None:
    parser.add_argument(
        "--data", default="../shared/data", metavar="FOLDER",
        help="published data sets, or what bench/zoo/prepare.py made of them; "
        "default: ../shared/data",
    )  # fmt: skip
    parser.add_argument(
        "--adapter", action="append", default=[], type=named_path, metavar="NAME=PATH",
        help="a further adapter, of a task of bench/zoo/tasks.py; repeatable",
    )  # fmt: skip
    _add(parser, "--concurrency", positive_list, "1,8,32", "requests at a time", "N,N,...")
    _add(parser, "--learned", count, 64, "texts that each is asked first, which are not measured")
    _add(parser, "--max-tokens", positive, 64, "of an answer")
    _add_rounds(parser, 3)


def _nlg(parser: _Parser) -> None:
    parser.add_argument(
        "--hypotheses", required=True, metavar="FILE", help="the generated texts, one a line"
    )
    parser.add_argument(
        "--references", required=True, metavar="FILE",
        help="the references of each text, one a line, an empty line between two texts",
    )  # fmt: skip


def _train(parser: _Parser) -> None:
    parser.add_argument("--model", help="as for redmux train --base; default: smollm2")
    _add(parser, "--tasks", positive, 8, "adapters")
    _add(
        parser, "--batch-sizes", positive_list, "1,2", "examples of an adapter in a step", "N,N,..."
    )
    _add(parser, "--steps", positive, 2, "optimizer steps of each adapter in a round")
    _add(parser, "--prompt-tokens", lengths, "32:64", "length, or a range to draw it from", "N|A:B")
    _add(
        parser, "--output-tokens", lengths, "8:24",
        "the same of answers, which only decoders learn", "N|A:B",
    )  # fmt: skip
    _add(parser, "--max-pass-tokens", positive, 2048, "as for redmux train")
    parser.add_argument("--autocast", action="store_true", help="as for redmux train")
    _add(parser, "--threads", count, 0, "of torch; 0 is its own choice")
    _add(parser, "--seed", count, 0, "of everything that is drawn")
    _add_rounds(parser, 3)


def _jobs(parser: _Parser) -> None:
    _add(parser, "--concurrency", positive, 8, "requests that are open at a time")
    _add(parser, "--num-requests", positive, 32, "requests of a turn")
    _add(parser, "--tasks", positive, 4, "adapters that are trained together")
    _add(parser, "--batch-size", positive, 4, "examples of an adapter in a training step")
    _add_rounds(parser, 5)


def _common() -> _Parser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--json", type=file, metavar="FILE", help="write the results into a file, too"
    )
    return parser


def _target() -> _Parser:
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("server that runs already")
    group.add_argument("--target", metavar="HOST:PORT", help="default: start one")
    group.add_argument(
        "--api-key", default=os.environ.get("REDMUX_API_KEY") or None, metavar="KEY",
        help="default: REDMUX_API_KEY",
    )  # fmt: skip
    group.add_argument("--tls", action="store_true", help="use TLS and the system's authorities")
    return parser


def _server() -> _Parser:
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("server that is started, or its engine in this process")
    group.add_argument(
        "--model", help="as for redmux serve; default: smollm2, or what --target serves"
    )
    group.add_argument(
        "--serve-arg", action="append", default=[], metavar="ARG",
        help="an argument of redmux serve, as --serve-arg=--threads=2; repeatable",
    )  # fmt: skip
    return parser


def _load() -> _Parser:
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("load")
    _add(group, "--prompt-tokens", lengths, "64", "length, or a range to draw it from", "N|A:B")
    _add(group, "--output-tokens", lengths, "64", "length, or a range to draw it from", "N|A:B")
    _add(group, "--seed", count, 0, "of everything that is drawn")
    _add(group, "--timeout", positive_float, 600.0, "limit of each request in seconds", "SECONDS")
    return parser


def _add_rounds(parser: _Parser, default: int) -> None:
    _add(parser, "--rounds", positive, default, "rounds to take medians over")


def _add(
    parser: _Parser | argparse._ArgumentGroup,
    flag: str,
    kind: Callable[[str], object],
    default: object,
    text: str,
    metavar: str = "N",
) -> None:
    """Adds an option that tells its default, which is parsed like a value if it is a text."""
    parser.add_argument(
        flag, type=kind, default=default, metavar=metavar, help=f"{text}; default: {default}"
    )
