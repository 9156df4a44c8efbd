"""`redmux score`: how likely continuations of a prompt are."""

import argparse
import json

from redmux._connecting import connect
from redmux._printing import json_line
from redmux.types import Prompt, TokenScores


def add_score(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    server: argparse.ArgumentParser,
) -> None:
    """Adds the command; `server` has the options of the connection."""
    parser = commands.add_parser(
        "score", parents=[server], help="tell how likely continuations of a prompt are"
    )
    parser.set_defaults(run=_score)
    parser.add_argument("prompt", metavar="PROMPT", help="the text before the continuations")
    parser.add_argument("continuations", metavar="CONTINUATION", nargs="*")
    parser.add_argument("--adapter", metavar="NAME", help="default: the base model")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's chat message")
    parser.add_argument(
        "--parse-special-tokens", action="store_true",
        help="with --chat: take what is written like a special token for one",
    )  # fmt: skip
    parser.add_argument("--prompt-logprobs", action="store_true", help="score the prompt, too")


def _score(options: argparse.Namespace) -> int:
    prompt: Prompt = options.prompt
    if options.chat:
        prompt = [{"role": "user", "content": options.prompt}]
    with connect(options) as client:
        scores = client.score(
            prompt, options.continuations, adapter=options.adapter,
            prompt_logprobs=options.prompt_logprobs,
            parse_special_tokens=options.parse_special_tokens,
        )  # fmt: skip
    if options.json:
        print(json_line(scores))
        return 0
    if scores.prompt is not None:
        _print_line(scores.prompt, "(prompt)")
    for found, text in zip(scores.continuations, options.continuations, strict=True):
        _print_line(found, json.dumps(text, ensure_ascii=False))
    return 0


def _print_line(scores: TokenScores, name: str) -> None:
    greedy = "greedy" if scores.all_greedy else "-"
    print(f"{scores.logprob:.4f}\t{len(scores.token_ids)} tokens\t{greedy}\t{name}")
