"""`redmux adapters`: converts, creates, checks and shows adapters on this machine."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from redmux.errors import InvalidAdapterError, InvalidArgumentError, RedmuxError
from redmux.mixes import HOWS, Mix, MixPart, parse_layers, parse_part

from .bases.fingerprint import fingerprint
from .bases.load import load_tokenizer
from .bases.load_any import load_any
from .bases.match import without_sketch
from .bases.sites import POSITIONS, addressable_sites, editable_sites, red_sites, with_layer_norms
from .format.adapter import Adapter, check_base
from .format.config import AdapterMetadata
from .format.files import check_sites, read_adapter, write_file, write_folder
from .format.head import PROBLEM_TYPES
from .format.prompt import PromptFormat
from .format.strictjson import parse_json
from .mixing import mix
from .show import describe, plot, table


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; errors are one line on standard error."""
    arguments = command_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except RedmuxError as err:
        print(f"error: {' '.join(err.message.split())}", file=sys.stderr)
        return 1
    except OSError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    return 0


def command_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    parser = argparse.ArgumentParser(prog="redmux adapters", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    convert = commands.add_parser("convert", help="make an adapter of another library's file")
    convert.add_argument(
        "file",
        help="a delta_vector.pth of the RED authors, an IA3, BEFT or LN tuning adapter of PEFT, a "
        "control vector, or the biases of BitFit; or the folder of one",
    )
    convert.add_argument("--output", required=True, metavar="FOLDER", help="where to write it")
    convert.add_argument(
        "--strength", type=float, default=1.0, help="what a control vector is multiplied with"
    )
    convert.add_argument(
        "--labels", metavar="A,B", help="names of the outputs of the file's classification head"
    )
    convert.add_argument("--problem-type", choices=PROBLEM_TYPES, help="what the head is for")
    convert.add_argument(
        "--prompt-format",
        type=_prompt_format,
        metavar="F",
        help='how prompts were written in training: chatml, raw, or turns as JSON such as {"user": '
        '["Human: ", "\\n\\n"], "assistant": ["Assistant: ", "\\n"]}; default: the base '
        "model's chat template",
    )
    convert.add_argument("--description", default="", metavar="TEXT", help="what it does")
    convert.add_argument("--license", default="", metavar="SPDX", help="license of the vectors")
    convert.add_argument(
        "--timeout", type=_seconds, default=120.0, metavar="S", help="for reading; default: 120"
    )
    base = convert.add_mutually_exclusive_group(required=True)
    base.add_argument(
        "--base", metavar="MODEL", help="the base model: folder, .gguf file or hub id"
    )
    base.add_argument("--base-fingerprint", metavar="FP", help="its fingerprint, where known")
    convert.set_defaults(run=_convert)

    create = commands.add_parser("create", help="write an adapter that changes nothing")
    create.add_argument("--base", required=True, metavar="MODEL", help="the base model")
    create.add_argument("--output", required=True, metavar="FOLDER", help="where to write it")
    create.add_argument(
        "--position", choices=POSITIONS, default="ffn", help="which outputs it edits; default: ffn"
    )
    create.add_argument("--layers", type=_layers, metavar="0,4-7", help="only in these layers")
    create.add_argument(
        "--exclude", type=_layers, default=[], metavar="0,4-7", help="not in these layers"
    )
    create.set_defaults(run=_create)

    verify = commands.add_parser("verify", help="check an adapter, alone or against its base")
    verify.add_argument("path", help="adapter folder or safetensors file")
    verify.add_argument("--base", metavar="MODEL", help="the base model it has to fit")
    verify.add_argument("--json", action="store_true", help="print JSON")
    _add_allow_other_base(verify)
    verify.set_defaults(run=_verify)

    fold = commands.add_parser(
        "fold", help="write the base model with an adapter in its weights, for plain transformers"
    )
    fold.add_argument("path", help="adapter folder or safetensors file")
    fold.add_argument("--base", required=True, metavar="MODEL", help="the base model")
    fold.add_argument(
        "--tokenizer", default="", metavar="MODEL", help="folder or hub id; default: the base's own"
    )
    fold.add_argument("--output", required=True, metavar="FOLDER", help="where to write the model")
    _add_allow_other_base(fold)
    fold.set_defaults(run=_fold)

    mixing = commands.add_parser("mix", help="write several adapters, each with a weight, as one")
    mixing.add_argument(
        "parts", nargs="+", type=_part, metavar="PATH[:WEIGHT[:LAYERS]]",
        help="adapter folder or safetensors file, its weight (default: 1) and the layers in which "
        "it acts, such as a:0.7 or a:0.7:0,4-7",
    )  # fmt: skip
    mixing.add_argument("--output", required=True, metavar="FOLDER", help="where to write it")
    mixing.add_argument(
        "--how", choices=HOWS, default="interpolate",
        help="add up what they change, or have them edit one after the other; default: interpolate",
    )  # fmt: skip
    mixing.add_argument(
        "--strength", type=float, default=1.0, metavar="X", help="weight of the whole; default: 1"
    )
    mixing.add_argument(
        "--layers", type=_layers, metavar="0,4-7", help="where parts act that do not say it"
    )
    mixing.add_argument(
        "--prompt-from", metavar="PATH", help="the part whose prompt format the result has"
    )
    _add_allow_other_base(mixing)
    mixing.set_defaults(run=_mix)

    stamp = commands.add_parser(
        "stamp", help="write an adapter anew, as made for a base model that you know it to be for"
    )
    stamp.add_argument("path", help="adapter folder or safetensors file")
    stamp.add_argument("--base", required=True, metavar="MODEL", help="the base model")
    stamp.add_argument("--output", required=True, metavar="FOLDER", help="where to write it")
    stamp.set_defaults(run=_stamp)

    pack = commands.add_parser(
        "pack", help="write an adapter as one file with its configuration inside, as HTTP takes it"
    )
    pack.add_argument("path", help="adapter folder or safetensors file")
    pack.add_argument(
        "--output", required=True, metavar="FILE.safetensors", help="where to write it"
    )
    pack.set_defaults(run=_pack)

    show = commands.add_parser("show", help="print what an adapter holds")
    show.add_argument("path", help="adapter folder or safetensors file")
    show.add_argument("--json", action="store_true", help="print JSON")
    show.add_argument(
        "--plot", metavar="FILE.png", help="draw the norms per layer (needs redmux[plot])"
    )
    show.set_defaults(run=_show)
    return parser


def _convert(arguments: argparse.Namespace) -> None:
    from .convert import Options, Target, convert

    model = None if arguments.base is None else load_any(arguments.base)
    options = Options(
        strength=arguments.strength,
        labels=None if arguments.labels is None else arguments.labels.split(","),
        problem_type=arguments.problem_type,
        prompt_format=arguments.prompt_format,
        metadata=AdapterMetadata(
            base_model_name_or_path=_public_name(arguments.base or ""),
            description=arguments.description,
            license=arguments.license,
            created_by="redmux adapters convert",
        ),
        timeout_s=arguments.timeout,
    )
    base = arguments.base_fingerprint if model is None else fingerprint(model)
    adapter, kind = convert(arguments.file, Target(base, model), options)
    write_folder(adapter, arguments.output)
    print(f"{kind} -> {_summary(adapter)}")
    if model is not None:
        _warn_of_blocks(adapter, model)


def _create(arguments: argparse.Namespace) -> None:
    model = load_any(arguments.base)
    sites = red_sites(model, arguments.position, layers=arguments.layers, exclude=arguments.exclude)
    metadata = AdapterMetadata(
        base_model_name_or_path=_public_name(arguments.base), created_by="redmux adapters create"
    )
    adapter = Adapter.identity(sites, fingerprint(model), metadata=metadata)
    write_folder(adapter, arguments.output)
    print(_summary(adapter))
    _warn_of_blocks(adapter, model)


def _verify(arguments: argparse.Namespace) -> None:
    adapter = read_adapter(arguments.path)
    model = None if arguments.base is None else load_any(arguments.base)
    match = None
    if model is not None:
        match = check_base(adapter, fingerprint(model), arguments.allow_other_base)
        check_sites(adapter.sites, with_layer_norms(addressable_sites(model)))
    if arguments.json:
        print(json.dumps({**_facts(adapter), "base_match": match}))
    else:
        print(f"ok {_summary(adapter)}{'' if match is None else f'; base: {match}'}")
    if model is not None:
        _warn_of_blocks(adapter, model)


def _stamp(arguments: argparse.Namespace) -> None:
    adapter, model = read_adapter(arguments.path), load_any(arguments.base)
    check_sites(adapter.sites, with_layer_norms(addressable_sites(model)))
    adapter = dataclasses.replace(adapter, base_fingerprint=fingerprint(model))
    write_folder(adapter, arguments.output)
    print(_summary(adapter))


def _pack(arguments: argparse.Namespace) -> None:
    adapter = read_adapter(arguments.path)
    write_file(adapter, arguments.output)
    print(_summary(adapter))


def _mix(arguments: argparse.Namespace) -> None:
    parts = [
        dataclasses.replace(part, layers=arguments.layers) if part.layers is None else part
        for part in arguments.parts
    ]
    mixture = Mix(parts, arguments.how, arguments.strength, arguments.prompt_from)
    adapters = [read_adapter(part.adapter) for part in parts]
    adapter = mix(mixture, adapters, allow_other_base=arguments.allow_other_base)
    write_folder(adapter, arguments.output)
    print(_summary(adapter))


def _fold(arguments: argparse.Namespace) -> None:
    from .fold import fold

    adapter = read_adapter(arguments.path)
    tokenizer = load_tokenizer(arguments.base, arguments.tokenizer)
    model = fold(adapter, load_any(arguments.base), arguments.allow_other_base)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"{type(model).__name__} with {_summary(adapter)}")


def _show(arguments: argparse.Namespace) -> None:
    adapter = read_adapter(arguments.path)
    name = Path(arguments.path).resolve().stem
    if arguments.plot is not None:
        plot(adapter, name, Path(arguments.plot))
    description = describe(adapter, name)
    if arguments.json:
        print(json.dumps(description, indent=2))
        return
    sites = description.pop("sites")
    description.update(description.pop("metadata"), sites=len(sites))
    description["license"] = description["license"] or "not stated"
    for key, value in description.items():
        if value:
            text = value if isinstance(value, str) else json.dumps(value)
            print(f"{key:24}{' '.join(text.split())}")
    print()
    _print_table(table(sites))


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        print(f"{first:{widths[0]}}", *cells, sep="  ")


def _add_allow_other_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-other-base",
        action="store_true",
        help="take a base with other weights or another vocabulary, such as a fine-tuned relative",
    )


def _facts(adapter: Adapter) -> dict[str, object]:
    return {
        "digest": adapter.digest,
        "base_fingerprint": without_sketch(adapter.base_fingerprint),
        "num_sites": len(adapter.edits),
        "num_parameters": adapter.num_parameters,
    }


def _summary(adapter: Adapter) -> str:
    return "{digest} for {base_fingerprint}: {num_sites} sites, {num_parameters} parameters".format(
        **_facts(adapter)
    )


def _warn_of_blocks(adapter: Adapter, model: nn.Module) -> None:
    """Says which sites no server edits yet: norms and activations."""
    others = sorted(adapter.sites.keys() - with_layer_norms(editable_sites(model)).keys())
    if others:
        print(
            "note: servers edit linear modules and sums with the residual only and will refuse "
            f"{len(others)} sites, such as {others[0]}; `redmux adapters fold` may take them",
            file=sys.stderr,
        )


def _public_name(spec: str) -> str:
    """Returns the name to pass on of a base model: folders mean nothing on other machines."""
    return Path(spec).resolve().name if spec and Path(spec).expanduser().exists() else spec


def _layers(text: str) -> list[int]:
    """Returns the layers in a list such as "0,4-7"."""
    try:
        return parse_layers(text)
    except InvalidArgumentError as err:
        raise argparse.ArgumentTypeError(err.message) from None


def _part(text: str) -> MixPart:
    try:
        return parse_part(text)
    except InvalidArgumentError as err:
        raise argparse.ArgumentTypeError(err.message) from None


def _prompt_format(text: str) -> PromptFormat:
    """Returns the format of a name, or of JSON as in adapter_config.json, "type" or not."""
    from .train.prompts import CHATML, RAW

    named = {"chatml": CHATML, "raw": RAW}
    if text in named:
        return named[text]
    try:
        value = parse_json(text, "the prompt format")
        if isinstance(value, dict):
            value = {"type": "turns", **value}
        return PromptFormat.from_json(value)
    except InvalidAdapterError as err:
        raise argparse.ArgumentTypeError(
            f"{err.message}; give chatml, raw, or turns as docs/format.md has them"
        ) from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return seconds
