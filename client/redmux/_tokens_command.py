"""`redmux tokenize` and `redmux detokenize`: the tokens of a prompt, and the text of tokens."""

import argparse
import json

from redmux._connecting import connect
from redmux._printing import json_line


def add_tokenize(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    server: argparse.ArgumentParser,
) -> None:
    """Adds both commands; `server` has the options of the connection."""
    parser = commands.add_parser(
        "tokenize", parents=[server], help="tell the tokens that a prompt becomes"
    )
    parser.set_defaults(run=_tokenize)
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--adapter", metavar="NAME", help="default: the base model")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's chat message")
    parser.add_argument(
        "--no-special-tokens", action="store_true",
        help="leave out what the model's tokenizer puts before a text",
    )  # fmt: skip
    parser.add_argument(
        "--parse-special-tokens", action="store_true",
        help="with --chat: take what is written like a special token for one",
    )  # fmt: skip
    parser = commands.add_parser("detokenize", parents=[server], help="tell the text of tokens")
    parser.set_defaults(run=_detokenize)
    parser.add_argument("token_ids", metavar="ID", nargs="+", type=int)


def _tokenize(options: argparse.Namespace) -> int:
    is_chat = options.chat
    with connect(options) as client:
        tokens = client.tokenize(
            [{"role": "user", "content": options.prompt}] if is_chat else options.prompt,
            adapter=options.adapter,
            add_special_tokens=False if options.no_special_tokens else None,
            token_texts=True,
            parse_special_tokens=options.parse_special_tokens,
        )
    if options.json:
        print(json_line(tokens))
        return 0
    for token_id, text in zip(tokens.token_ids, tokens.token_texts or (), strict=True):
        print(f"{token_id}\t{json.dumps(text, ensure_ascii=False)}")
    return 0


def _detokenize(options: argparse.Namespace) -> int:
    with connect(options) as client:
        text = client.detokenize(options.token_ids)
    print(json.dumps({"text": text}) if options.json else text)
    return 0
