"""Several adapters as one, in place of the one that `model` names."""

from typing import Annotated

from pydantic import Field

from redmux.errors import InvalidArgumentError
from redmux.mixes import MAX_LAYERS, MAX_PARTS, How, Mix, MixPart
from redmux_server.http_api.errors import Refusal
from redmux_server.http_api.schemas.body import Body


class MixPartBody(Body):
    """One adapter of a mix."""

    adapter: str = Field(description="Its name or digest.")
    weight: float = Field(1.0, allow_inf_nan=False, description="How far it edits; 1: as alone.")
    layers: Annotated[list[int], Field(max_length=MAX_LAYERS, fail_fast=True)] | None = Field(
        None, description="Numbers of the layers in which it acts; all of them without."
    )


class MixBody(Body):
    """Several adapters as one; `model` is the base model then."""

    parts: Annotated[list[MixPartBody], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
    how: How = "interpolate"
    strength: float = Field(1.0, allow_inf_nan=False, description="Weight of the whole.")
    prompt_from: str | None = Field(None, description="The part whose prompt format chats have.")

    def mix(self) -> Mix:
        """Returns what services are asked for; raises Refusal for what cannot be meant."""
        try:
            parts = [MixPart(part.adapter, part.weight, part.layers) for part in self.parts]
            return Mix(parts, self.how, self.strength, self.prompt_from)
        except InvalidArgumentError as err:
            raise Refusal(err.message, param="mix") from None
