"""The base model that a converted adapter is for, and what its modules are called there."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from redmux.errors import InvalidAdapterError

from ..bases.architectures import Stack, model_type_of, stacks_of
from ..format.strictjson import shown

# Where models with a head keep the bare model, from which adapters of encoders count their paths.
_BARE_MODELS = ("bert.", "distilbert.", "electra.", "mpnet.", "roberta.")


@dataclass(frozen=True)
class Target:
    """A base model by its fingerprint, with its modules where it is at hand."""

    fingerprint: str
    model: nn.Module | None = None

    @property
    def model_type(self) -> str:
        """The architecture, such as "llama"."""
        return model_type_of(self.fingerprint)

    def modules(self, what: str) -> dict[str, nn.Module]:
        """Returns the modules by path; InvalidAdapterError says that `what` needs them."""
        if self.model is None:
            raise InvalidAdapterError(
                f"{what} can only be converted with the base model at hand; give --base"
            )
        return dict(self.model.named_modules())

    def layers(self) -> Iterator[tuple[Stack, int]]:
        """Yields every layer of the model at hand with the stack that it is in."""
        assert self.model is not None
        for stack in stacks_of(self.model_type):
            layers: Any = self.model.get_submodule(stack.layers)
            for layer in range(len(layers)):
                yield stack, layer


def bare_path(path: str) -> str:
    """Returns the module path inside the bare model."""
    for start in _BARE_MODELS:
        path = path.removeprefix(start)
    return path


def check_length(name: str, length: int, expected: int) -> None:
    """Raises InvalidAdapterError unless a vector of the file fits its module."""
    if length != expected:
        raise InvalidAdapterError(
            f"{shown(name)} has {length} values; the base model's module takes {expected}"
        )
