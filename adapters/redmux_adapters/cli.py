"""`redmux adapters`: converts, creates, checks and shows adapters on this machine."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from redmux.errors import RedmuxError

from .adapter import Adapter, check_base
from .base import load_base
from .config import AdapterMetadata
from .files import read_adapter
from .fingerprint import fingerprint
from .sites import editable_sites, ffn_sites


class _Base(NamedTuple):
    name: str
    fingerprint: str
    ffn_sites: dict[str, int]
    editable_sites: dict[str, int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; errors are one line on standard error."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except RedmuxError as err:
        print(f"error: {' '.join(err.message.split())}", file=sys.stderr)
        return 1
    except OSError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="redmux adapters", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    convert = commands.add_parser("convert", help="convert a delta_vector.pth of the RED authors")
    convert.add_argument("file", help="the delta_vector.pth")
    convert.add_argument("--output", required=True, metavar="FOLDER", help="where to write it")
    base = convert.add_mutually_exclusive_group(required=True)
    base.add_argument(
        "--base", metavar="MODEL", help="the base model: folder, .gguf file or hub id"
    )
    base.add_argument("--base-fingerprint", metavar="FP", help="its fingerprint, where known")
    convert.set_defaults(run=_convert)

    create = commands.add_parser("create", help="write an adapter that changes nothing")
    create.add_argument("--base", required=True, metavar="MODEL", help="the base model")
    create.add_argument("--output", required=True, metavar="FOLDER", help="where to write it")
    create.set_defaults(run=_create)

    verify = commands.add_parser("verify", help="check an adapter, alone or against its base")
    verify.add_argument("path", help="adapter folder or safetensors file")
    verify.add_argument("--base", metavar="MODEL", help="the base model it has to fit")
    verify.set_defaults(run=_verify)

    show = commands.add_parser("show", help="print what an adapter holds")
    show.add_argument("path", help="adapter folder or safetensors file")
    show.add_argument("--json", action="store_true", help="print JSON")
    show.set_defaults(run=_show)
    return parser


def _convert(arguments: argparse.Namespace) -> None:
    from .convert import convert_delta_vector

    base = None if arguments.base is None else _load(arguments.base)
    adapter = convert_delta_vector(
        arguments.file,
        base.fingerprint if base else arguments.base_fingerprint,
        metadata=AdapterMetadata(
            base_model_name_or_path=base.name if base else "",
            created_by="redmux adapters convert",
        ),
        expected_sites=base.editable_sites if base else None,
    )
    adapter.save(arguments.output)
    print(_summary(adapter))


def _create(arguments: argparse.Namespace) -> None:
    base = _load(arguments.base)
    metadata = AdapterMetadata(
        base_model_name_or_path=base.name, created_by="redmux adapters create"
    )
    adapter = Adapter.identity(base.ffn_sites, base.fingerprint, metadata=metadata)
    adapter.save(arguments.output)
    print(_summary(adapter))


def _verify(arguments: argparse.Namespace) -> None:
    adapter = read_adapter(arguments.path)
    if arguments.base is not None:
        base = _load(arguments.base)
        check_base(adapter, base.fingerprint)
        adapter = read_adapter(arguments.path, expected_sites=base.editable_sites)
    print(f"ok {_summary(adapter)}")


def _show(arguments: argparse.Namespace) -> None:
    adapter = read_adapter(arguments.path)
    description = _describe(adapter, Path(arguments.path).resolve().stem)
    if arguments.json:
        print(json.dumps(description, indent=2))
        return
    sites = description.pop("sites")
    description.update(description.pop("metadata"), sites=len(sites))
    for key, value in description.items():
        if value:
            text = value if isinstance(value, str) else json.dumps(value)
            print(f"{key:24}{' '.join(text.split())}")
    print()
    _print_table(
        [
            ("site", "size", "scale from", "to", "bias from", "to"),
            *(
                (
                    site["path"],
                    str(site["size"]),
                    *(f"{x:.5g}" for x in site["scale"] + site["bias"]),
                )
                for site in sorted(sites, key=_in_order_of_layers)
            ),
        ]
    )


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        print(f"{first:{widths[0]}}", *cells, sep="  ")


def _in_order_of_layers(site: dict[str, Any]) -> list[tuple[int, str]]:
    """Returns a key that sorts layer 10 after layer 9."""
    parts = site["path"].split(".")
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _describe(adapter: Adapter, name: str) -> dict[str, Any]:
    prompt_format = adapter.prompt_format
    return {
        "name": name,
        "digest": adapter.digest,
        "base_fingerprint": adapter.base_fingerprint,
        "num_parameters": adapter.num_parameters,
        "size_bytes": adapter.nbytes,
        "prompt_format": None if prompt_format is None else prompt_format.to_json(),
        "metadata": asdict(adapter.metadata),
        "sites": [
            {
                "path": path,
                "size": edit.dim,
                "scale": [edit.scale.min().item(), edit.scale.max().item()],
                "bias": [edit.bias.min().item(), edit.bias.max().item()],
            }
            for path, edit in adapter.edits.items()
        ],
    }


def _summary(adapter: Adapter) -> str:
    return (
        f"{adapter.digest} for {adapter.base_fingerprint}: {len(adapter.edits)} sites, "
        f"{adapter.num_parameters} parameters"
    )


def _load(spec: str) -> _Base:
    model, _ = load_base(spec)
    # Adapters are passed on, folders of this machine mean nothing elsewhere.
    name = Path(spec).resolve().name if Path(spec).expanduser().exists() else spec
    return _Base(name, fingerprint(model), ffn_sites(model), editable_sites(model))
