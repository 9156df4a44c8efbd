"""What an adapter holds, as JSON values, as a table and as a picture."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from redmux.errors import FailedPreconditionError

from .bases.sites import LAYER_NORM
from .format.adapter import Adapter, Edit

Layer = tuple[str, int | None]  # the site without its layer's number, and that number


def describe(adapter: Adapter, name: str) -> dict[str, Any]:
    """Returns everything that is known of `adapter`, as values that JSON can hold."""
    prompt_format, head = adapter.prompt_format, adapter.head
    return {
        "name": name,
        "digest": adapter.digest,
        "base_fingerprint": adapter.base_fingerprint,
        "num_parameters": adapter.num_parameters,
        "size_bytes": adapter.nbytes,
        "edits": _variant(adapter),
        "apply": adapter.apply,
        "prompt_format": None if prompt_format is None else prompt_format.to_json(),
        "head": None
        if head is None
        else {**head.config.to_json(), "num_parameters": head.num_parameters},
        "metadata": asdict(adapter.metadata),
        "sites": [_describe_site(path, edit) for path, edit in adapter.edits.items()],
    }


def table(sites: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Returns the rows of a table of the `sites` of `describe`, in the order of layers."""
    rows: list[tuple[str, ...]] = [
        ("site", "size", "scale from", "to", "|scale-1|", "bias from", "to", "|bias|")
    ]
    for site in sorted(sites, key=lambda site: _in_order_of_layers(site["path"])):
        values = [*site["scale"], site["scale_norm"], *site["bias"], site["bias_norm"]]
        rows.append((site["path"], str(site["size"]), *(f"{value:.5g}" for value in values)))
    return rows


def plot(adapter: Adapter, name: str, path: Path) -> None:
    """Draws how far scales and biases are from changing nothing, per layer, into a picture.

    The kind of picture is that of the file's ending. Raises FailedPreconditionError where
    matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise FailedPreconditionError(
            "a plot needs matplotlib, which is not installed; pip install 'redmux[plot]'"
        ) from None
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for site in sorted(adapter.edits, key=_in_order_of_layers):
        edit = adapter.edits[site]
        kind, layer = split_layer(site)
        # Per value, so that sites of different sizes can be compared.
        size = edit.dim**0.5
        point = (layer or 0, _scale_norm(edit) / size, _bias_norm(edit) / size)
        lines.setdefault(kind, []).append(point)
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for kind, points in lines.items():
        layers, scales, biases = zip(*points, strict=True)
        axes[0].plot(layers, scales, marker=".", label=kind)
        axes[1].plot(layers, biases, marker=".", label=kind)
    axes[0].set_ylabel("scale - 1 (root mean square)")
    axes[1].set_ylabel("bias (root mean square)")
    axes[1].set_xlabel("layer")
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.suptitle(f"{name}: {adapter.num_parameters:,} parameters")
    figure.savefig(path, dpi=120)


def split_layer(site: str) -> Layer:
    """Returns a site's path with "*" for the number of its layer, the first in it, and that."""
    parts = site.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            return ".".join([*parts[:index], "*", *parts[index + 1 :]]), int(part)
    return site, None


def _describe_site(path: str, edit: Edit) -> dict[str, Any]:
    return {
        "path": path,
        "size": edit.dim,
        "scale": [edit.scale.min().item(), edit.scale.max().item()],
        "scale_norm": _scale_norm(edit),
        "bias": [edit.bias.min().item(), edit.bias.max().item()],
        "bias_norm": _bias_norm(edit),
    }


def _scale_norm(edit: Edit) -> float:
    """Returns the Euclidean distance of the scale from ones."""
    return float(torch.linalg.vector_norm(edit.scale - 1))


def _bias_norm(edit: Edit) -> float:
    return float(torch.linalg.vector_norm(edit.bias))


def _variant(adapter: Adapter) -> str:
    """Returns which of the paper's variants it is by its values, not by how it was trained."""
    scales = any(bool((edit.scale != 1).any()) for edit in adapter.edits.values())
    biases = any(bool(edit.bias.any()) for edit in adapter.edits.values())
    names = {
        (True, True): "scale and bias",
        (True, False): "scale only",
        (False, True): "bias only",
        (False, False): "none, it changes nothing",
    }
    with_norms = any(path.endswith(LAYER_NORM) for path in adapter.edits)
    return names[scales, biases] if not with_norms else "scale and bias, then a LayerNorm"


def _in_order_of_layers(path: str) -> list[tuple[int, str]]:
    """Returns a key that sorts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
