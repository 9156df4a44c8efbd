"""Mixes several adapters into one, whose edits are theirs taken together."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from redmux.errors import InvalidAdapterError, WrongBaseError
from redmux.mixes import Mix, MixPart, layers_text

from .bases.match import BaseMatch, match_bases
from .bases.sites import LAYER_NORM
from .format.adapter import Adapter, Edit
from .format.config import AdapterMetadata
from .format.head import Head
from .format.prompt import PromptFormat
from .format.strictjson import shown

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")

Array = NDArray[np.float64]


def mix(mixture: Mix, adapters: Sequence[Adapter], *, allow_other_base: bool = False) -> Adapter:
    """Returns the adapter that edits as `adapters` do together, one for each part of `mixture`.

    Everything is computed in fp64 and rounded to fp32 once, zeros are positive, and the order of
    the parts of an interpolation changes nothing. Modules that some parts do not edit are left as
    they are by them. A classification head comes from the one part that has any; all of them may
    have the same.

    Raises InvalidAdapterError, which names the parts, where their modules have other sizes, where
    heads, prompt formats (unless the mix says whose) or the tokens that they edit differ, for the
    LayerNorm behind an edit, for a part that edits nothing in its layers and for values that become
    too large; WrongBaseError where parts are for different bases, unless `allow_other_base` for
    relatives.
    """
    order = _order(mixture, [adapter.digest for adapter in adapters])
    parts = [mixture.parts[place] for place in order]
    ordered = [adapters[place] for place in order]
    _check_bases(parts, ordered, allow_other_base)
    acting = [_acting(part, adapter) for part, adapter in zip(parts, ordered, strict=True)]
    combine = _interpolate if mixture.how == "interpolate" else _compose
    edits = {}
    for site in sorted(_dims(parts, acting)):
        found = [
            (part.weight, *_vectors(edits_of[site]))
            for part, edits_of in zip(parts, acting, strict=True)
            if site in edits_of
        ]
        edits[site] = _edit(*_weighted(mixture.strength, *combine(found)))
    return Adapter(
        ordered[0].base_fingerprint,
        edits,
        _prompt_format(mixture, adapters),
        _metadata(mixture, adapters),
        _head(mixture, adapters),
        _apply(mixture, adapters),
    )


def recipe_of(mixture: Mix, digests: Sequence[str]) -> str:
    """Returns the JSON that tells a mix of adapters with these digests: equal text, equal result.

    The parts of an interpolation stand in the order of their digests.
    """
    value: dict[str, object] = {"how": mixture.how, "strength": mixture.strength}
    value["parts"] = [
        {"digest": digests[place], "weight": mixture.parts[place].weight}
        | _layers_told(mixture.parts[place])
        for place in _order(mixture, digests)
    ]
    if mixture.prompt_from is not None:
        value["prompt_from"] = digests[_place_of_prompt(mixture)]
    return json.dumps(value, separators=(",", ":"))


def recipe_digest(mixture: Mix, digests: Sequence[str]) -> str:
    """Returns "sha256:" and 64 hexadecimal digits of the recipe."""
    return f"sha256:{hashlib.sha256(recipe_of(mixture, digests).encode()).hexdigest()}"


def _order(mixture: Mix, digests: Sequence[str]) -> list[int]:
    """Returns the places of the parts in the order in which they are computed."""
    assert len(digests) == len(mixture.parts)

    def key(place: int) -> tuple[str, float, str]:
        part = mixture.parts[place]
        return digests[place], part.weight, _layers_told(part).get("layers", "")

    places = list(range(len(digests)))
    return sorted(places, key=key) if mixture.how == "interpolate" else places


def _layers_told(part: MixPart) -> dict[str, str]:
    return {} if part.layers is None else {"layers": layers_text(part.layers)}


def _acting(part: MixPart, adapter: Adapter) -> Mapping[str, Edit]:
    """Returns the edits of a part in its layers."""
    edits = adapter.edits
    if part.layers is not None:
        layers = frozenset(part.layers)
        edits = {site: edit for site, edit in edits.items() if layer_of(site) in layers}
    if not edits:
        found = sorted({n for site in adapter.edits if (n := layer_of(site)) is not None})
        raise InvalidAdapterError(
            f"{part.adapter[:80]!r} edits nothing in the layers {layers_text(part.layers or ())} "
            f"that the mix takes of it; it edits the layers {layers_text(found) or 'of no model'}"
        )
    for site in edits:
        if site.endswith(LAYER_NORM):
            raise InvalidAdapterError(
                f"{part.adapter[:80]!r} has a LayerNorm behind an edit, {shown(site)}, whose mean "
                "and variance depend on the token, so it cannot be mixed; use it alone"
            )
    return edits


def layer_of(site: str) -> int | None:
    """Returns the number of the layer that a module is in, None for one outside of layers."""
    found = _LAYER.search(site)
    return None if found is None else int(found[1])


def _check_bases(parts: Sequence[MixPart], adapters: Sequence[Adapter], allow_other: bool) -> None:
    first = adapters[0].base_fingerprint
    for part, adapter in zip(parts, adapters, strict=True):
        match = match_bases(adapter.base_fingerprint, first)
        if match is BaseMatch.FOREIGN or (match is BaseMatch.OTHER and not allow_other):
            raise WrongBaseError(
                f"{parts[0].adapter[:80]!r} was made for base {first!r} and {part.adapter[:80]!r} "
                f"for {adapter.base_fingerprint!r}; the parts of a mix have to be for one base"
            )


def _dims(parts: Sequence[MixPart], acting: Sequence[Mapping[str, Edit]]) -> dict[str, int]:
    """Returns the modules that any part edits, with their sizes."""
    found: dict[str, int] = {}
    of: dict[str, str] = {}
    for part, edits in zip(parts, acting, strict=True):
        for site, edit in edits.items():
            dim, name = found.setdefault(site, edit.dim), of.setdefault(site, part.adapter)
            if dim != edit.dim:
                raise InvalidAdapterError(
                    f"the vectors of {shown(site)} have {dim} values in {name[:80]!r} and "
                    f"{edit.dim} in {part.adapter[:80]!r}; the parts of a mix have to fit one base"
                )
    return found


def _vectors(edit: Edit) -> tuple[Array, Array]:
    return edit.scale.numpy().astype(np.float64), edit.bias.numpy().astype(np.float64)


def _weighted(weight: float, scale: Array, bias: Array) -> tuple[Array, Array]:
    """Returns an edit that is weight times as far from the one that changes nothing.

    In this form weights of 1 and 0 give exactly the edit and exactly nothing, whatever the scale.
    """
    return (1 - weight) + weight * scale, weight * bias


def _interpolate(edits: Sequence[tuple[float, Array, Array]]) -> tuple[Array, Array]:
    rest = math.fsum([1.0, *(-weight for weight, _, _ in edits)])
    scale, bias = np.full_like(edits[0][1], rest), np.zeros_like(edits[0][2])
    for weight, scale_of, bias_of in edits:
        scale += weight * scale_of
        bias += weight * bias_of
    return scale, bias


def _compose(edits: Sequence[tuple[float, Array, Array]]) -> tuple[Array, Array]:
    scale, bias = np.ones_like(edits[0][1]), np.zeros_like(edits[0][2])
    for edit in edits:
        scale_of, bias_of = _weighted(*edit)
        scale, bias = scale_of * scale, scale_of * bias + bias_of
    return scale, bias


def _edit(scale: Array, bias: Array) -> Edit:
    with np.errstate(over="ignore"):  # infinities are refused with all that is too large
        rounded = [vector.astype(np.float32) + np.float32(0) for vector in (scale, bias)]
    return Edit(*map(torch.from_numpy, rounded))


def _place_of_prompt(mixture: Mix) -> int:
    names = [part.adapter for part in mixture.parts]
    return names.index(mixture.prompt_from) if mixture.prompt_from is not None else 0


def _prompt_format(mixture: Mix, adapters: Sequence[Adapter]) -> PromptFormat | None:
    chosen = _place_of_prompt(mixture)
    if mixture.prompt_from is None:
        for place, adapter in enumerate(adapters):
            if adapter.prompt_format != adapters[0].prompt_format:
                first, other = (mixture.parts[i].adapter[:80] for i in (0, place))
                raise InvalidAdapterError(
                    f"{first!r} and {other!r} were trained with different prompt formats; name "
                    "the part whose format the mix has as prompt_from"
                )
    return adapters[chosen].prompt_format


def _apply(mixture: Mix, adapters: Sequence[Adapter]) -> str:
    for part, adapter in zip(mixture.parts, adapters, strict=True):
        if adapter.apply != adapters[0].apply:
            raise InvalidAdapterError(
                f"{mixture.parts[0].adapter[:80]!r} edits {adapters[0].apply!r} and "
                f"{part.adapter[:80]!r} {adapter.apply!r}; the parts of a mix have to edit the "
                "same tokens"
            )
    return adapters[0].apply


def _head(mixture: Mix, adapters: Sequence[Adapter]) -> Head | None:
    found: tuple[str, Head] | None = None
    for part, adapter in zip(mixture.parts, adapters, strict=True):
        if adapter.head is None:
            continue
        if found is not None and not _are_equal(found[1], adapter.head):
            raise InvalidAdapterError(
                f"{found[0][:80]!r} and {part.adapter[:80]!r} bring different classification "
                "heads; a mix takes the head of one part"
            )
        found = part.adapter, adapter.head
    return None if found is None else found[1]


def _are_equal(first: Head, second: Head) -> bool:
    return first.config == second.config and all(
        torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items()
    )


def _metadata(mixture: Mix, adapters: Sequence[Adapter]) -> AdapterMetadata:
    """Returns what tells people of the mix: its recipe, and what all parts have in common."""
    common = {}
    for key in ("base_model_name_or_path", "license"):
        values = {getattr(adapter.metadata, key) for adapter in adapters}
        common[key] = values.pop() if len(values) == 1 else ""
    return AdapterMetadata(
        **common,
        created_by="redmux adapters mix",
        training=recipe_of(mixture, [adapter.digest for adapter in adapters]),
    )
