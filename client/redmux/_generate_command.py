"""`redmux generate`: one prompt, completed with one or more adapters."""

import argparse
import sys
from collections.abc import Awaitable
from pathlib import Path

from redmux._connecting import run_with_client
from redmux._side_by_side import SideBySide
from redmux.aio import AsyncClient
from redmux.errors import InvalidArgumentError
from redmux.mixes import HOWS, Mix, MixPart, parse_parts
from redmux.types import GenerationOptions, Prompt


def add_generate(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    server: argparse.ArgumentParser,
) -> None:
    """Adds the command; `server` has the options of the connection."""
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
    parser.add_argument(
        "--apply", metavar="WHERE",
        help="what adapters edit: all, prompt, generation or after:TEXT; default: what they say",
    )  # fmt: skip
    parser.add_argument(
        "--mix", type=_mix, action="append", default=[], metavar="NAME:WEIGHT,...",
        help="several adapters as one, such as a:0.7,b:0.3 or a:1:0-14; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--mix-how", choices=HOWS, default="interpolate",
        help="what the parts of --mix change is added up, or they edit one after the other",
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
    _add_grammar(parser)
    parser.add_argument("--logprobs", action="store_true", help="add log-probabilities to --json")
    parser.add_argument(
        "--top-logprobs", type=int, metavar="N", help="the same, with the N likeliest tokens"
    )
    parser.add_argument(
        "--stream", action=argparse.BooleanOptionalAction, default=True,
        help="print the text as it is decoded; default, but for --json",
    )  # fmt: skip


def _add_grammar(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "what the completion has to look like", "One of these; docs/structured_output.md has more."
    ).add_mutually_exclusive_group()
    group.add_argument(
        "--schema", type=Path, metavar="FILE", help="JSON that the JSON schema in this file allows"
    )
    group.add_argument("--json-object", action="store_true", help="any JSON object")
    group.add_argument(
        "--regex", metavar="PATTERN", help="a text that this regular expression matches as a whole"
    )
    group.add_argument(
        "--choice",
        action="append",
        metavar="TEXT",
        help="this text; repeatable, for one of several",
    )
    group.add_argument(
        "--grammar", type=Path, metavar="FILE", help="a text of the Lark grammar in this file"
    )


def _mix(text: str) -> list[MixPart]:
    try:
        return parse_parts(text)
    except InvalidArgumentError as error:
        raise argparse.ArgumentTypeError(error.message) from None


def _text_of(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{path} is not UTF-8 at byte {error.start}") from None


def _generate(options: argparse.Namespace) -> int:
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    prompt: Prompt = [{"role": "user", "content": text}] if options.chat else text
    adapters: list[str | Mix | None] = list(options.adapter)
    adapters += [Mix(parts, options.mix_how) for parts in options.mix]
    if options.base or not adapters:
        adapters.insert(0, None)
    wanted = GenerationOptions(
        apply=options.apply,
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
        schema=_text_of(options.schema),
        json_object=options.json_object,
        regex=options.regex,
        choices=options.choice,
        grammar=_text_of(options.grammar),
        logprobs=options.logprobs or options.top_logprobs is not None,
        top_logprobs=options.top_logprobs,
        parse_special_tokens=options.parse_special_tokens,
    )

    def run(client: AsyncClient) -> Awaitable[int]:
        sides = SideBySide(client, prompt, adapters, wanted, options.timeout)
        if options.stream and not options.json:
            return sides.print_streams()
        return sides.print_completions(options.json)

    return run_with_client(options, run)
