"""Mixes: several adapters, each with a weight, that edit as one."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal, TypeAlias, cast, get_args

from redmux.errors import InvalidArgumentError

How: TypeAlias = Literal["interpolate", "compose"]

HOWS: tuple[How, ...] = get_args(How)
MAX_PARTS = 8
MAX_WEIGHT = 100.0
MAX_LAYERS = 1024

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_PART = re.compile(
    rf"(?P<adapter>sha256:[0-9a-f]{{8,64}}|.+?)"
    rf"(?::(?P<weight>{_NUMBER})(?::(?P<layers>\d+(?:[-,]\d+)*))?)?"
)


@dataclass(frozen=True, slots=True)
class MixPart:
    """One adapter of a mix, by name or digest: weight times how far it is from changing nothing.

    `layers` are the numbers of the layers, from 0, in which it acts; None is all of them, and then
    modules outside of layers as well. Raises InvalidArgumentError on construction for a weight that
    is not finite or above 100 in magnitude, and for what are no layers.
    """

    adapter: str
    weight: float = 1.0
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.adapter, str) or not self.adapter:
            raise InvalidArgumentError(
                f"a part of the mix has the adapter {self.adapter!r}; it has to be a name or a "
                "digest"
            )
        name = f"the weight of {self.adapter[:80]!r} in the mix"
        object.__setattr__(self, "weight", _checked_factor(self.weight, name))
        if self.layers is not None:
            object.__setattr__(self, "layers", _checked_layers(self.layers, self.adapter))

    def __str__(self) -> str:
        if self.layers is not None:
            return f"{self.adapter}:{self.weight:g}:{layers_text(self.layers)}"
        return self.adapter if self.weight == 1 else f"{self.adapter}:{self.weight:g}"


@dataclass(frozen=True, slots=True, init=False)
class Mix:
    """Several adapters as one, in place of an adapter's name.

    With "interpolate", what the parts change is added up: 1 + sum of weight * (scale - 1), and sum
    of weight * bias. With "compose" they edit one after the other, in their order, each as far as
    its weight says. `strength` is then the weight of the whole. The prompt format of chats is that
    of the parts if they have the same, else that of the part `prompt_from` names.

    Raises InvalidArgumentError on construction for no parts or more than 8, and for an unknown
    `how` or `prompt_from`.
    """

    parts: tuple[MixPart, ...]
    how: How
    strength: float
    prompt_from: str | None

    def __init__(
        self,
        parts: Mapping[str, float] | Iterable[MixPart],
        how: How = "interpolate",
        strength: float = 1.0,
        prompt_from: str | None = None,
    ) -> None:
        """`parts` are weights by name or digest, or the parts themselves."""
        if isinstance(parts, Mapping):
            parts = [MixPart(name, weight) for name, weight in parts.items()]
        own = tuple(parts) if isinstance(parts, Iterable) else ()
        check_num_parts(len(own))
        for part in own:
            if not isinstance(part, MixPart):
                raise InvalidArgumentError(
                    f"the mix has the part {part!r:.80}, must be a MixPart; or give weights by name"
                )
        if how not in HOWS:
            raise InvalidArgumentError(f"how is {how!r}, must be one of {', '.join(HOWS)}")
        if prompt_from is not None and prompt_from not in [part.adapter for part in own]:
            raise InvalidArgumentError(
                f"prompt_from is {prompt_from!r}, must be the adapter of a part of the mix: "
                f"{', '.join(part.adapter[:80] for part in own)}"
            )
        object.__setattr__(self, "parts", own)
        object.__setattr__(self, "how", how)
        strength = _checked_factor(strength, "the strength of the mix")
        object.__setattr__(self, "strength", strength)
        object.__setattr__(self, "prompt_from", prompt_from)

    def __str__(self) -> str:
        text = f"{self.how}({','.join(map(str, self.parts))})"
        return text if self.strength == 1 else f"{text}*{self.strength:g}"


def check_num_parts(number: int) -> None:
    """Raises InvalidArgumentError for more parts than a mix may have, or none."""
    if not 0 < number <= MAX_PARTS:
        raise InvalidArgumentError(
            f"the mix has {number} parts, must be 1 to {MAX_PARTS} adapters with their weights"
        )


def parse_part(text: str) -> MixPart:
    """Returns the part that `ADAPTER`, `ADAPTER:WEIGHT` or `ADAPTER:WEIGHT:LAYERS` says."""
    found = _PART.fullmatch(text)
    if found is None:
        raise InvalidArgumentError(
            f"{text!r} is no part of a mix such as name, name:0.7 or name:0.7:0-14"
        )
    layers = None if found["layers"] is None else parse_layers(found["layers"])
    return MixPart(found["adapter"], float(found["weight"] or 1), layers)


def parse_parts(text: str) -> list[MixPart]:
    """Returns the parts in a list such as `a:0.7,b:0.3`; a comma between digits is of layers."""
    return [parse_part(part) for part in re.split(r",(?!\d+(?:-\d+)?(?:,|$))", text)]


def parse_layers(text: str) -> list[int]:
    """Returns the layers in a list such as "0,4-7"."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not (_is_number(first) and (_is_number(last) or not dash)):
            raise InvalidArgumentError(f"{text!r} is no list of layers such as 0,4-7")
        layers.extend(range(int(first), int(last or first) + 1))
    return layers


def layers_text(layers: Sequence[int]) -> str:
    """Returns a list such as "0,4-7" of layers in ascending order."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 6


def _checked_factor(value: object, name: str) -> float:
    # Compared before it is a float, which a huge whole number cannot be; a NaN is never less.
    number = cast(float, value)
    if isinstance(value, Real) and not isinstance(value, bool) and abs(number) <= MAX_WEIGHT:
        return float(number)
    raise InvalidArgumentError(
        f"{name} is {str(value)[:40]}, must be a number of at most {MAX_WEIGHT:g} in magnitude"
    )


def _checked_layers(layers: object, adapter: str) -> tuple[int, ...]:
    is_short = isinstance(layers, Sequence) and 0 < len(layers) <= MAX_LAYERS
    given = list(cast(Sequence[object], layers)) if is_short else []
    numbers = [n for n in given if isinstance(n, int) and not isinstance(n, bool) and n >= 0]
    if not given or len(numbers) < len(given):
        raise InvalidArgumentError(
            f"the layers of {adapter[:80]!r} in the mix are no list of 1 to {MAX_LAYERS} numbers "
            "from 0 on; leave them out for all"
        )
    return tuple(sorted(set(numbers)))
