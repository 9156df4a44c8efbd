"""Memory for packed weights, handed out by the system while the model is being loaded."""

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from redmux_adapters.bases.architectures import LLAMA_LIKE
from redmux_server.device import Choices
from redmux_server.models.cpu.packing import Packing


class Reservation:
    """Room for what `fused.pack` will copy of a model.

    A system hands out memory as it is first written to, and a virtual machine may have to ask its
    host for it: gigabytes take seconds, in which transformers can be imported.
    """

    def __init__(self, folder: Path, choices: Choices) -> None:
        """Starts to write to as much as the model in `folder` takes, if that can be told."""
        thread = ThreadPoolExecutor(1, "reservation")
        self._room: Future[Packing | None] | None = thread.submit(_reserve, folder, choices)
        thread.shutdown(wait=False)

    def take(self) -> Packing | None:
        """Returns the room, None where its size could not be told; once, as it is not kept here."""
        room, self._room = self._room, None
        return room.result() if room else None


def _reserve(folder: Path, choices: Choices) -> Packing | None:
    if choices.device.type != "cpu" or choices.dtype != torch.float32:
        return None
    shapes = product_shapes(folder)
    if shapes is None:
        return None
    packing = Packing(shapes)
    packing.packed.panels.fill(0)
    return packing


def product_shapes(folder: Path) -> list[tuple[int, int]] | None:
    """Returns (out_features, in_features) of all that `fused.pack` copies of a model.

    None for what is not fused and for a config that does not say it all.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        if {*config["architectures"]}.isdisjoint(LLAMA_LIKE):
            return None
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        dim = config.get("head_dim") or hidden // num_heads
        query, both = num_heads * dim, (num_heads + 2 * num_kv_heads) * dim
        layer = [(both, hidden), (hidden, query), (2 * inner, hidden), (hidden, inner)]
        return [*layer * config["num_hidden_layers"], (config["vocab_size"], hidden)]
    except (OSError, ValueError, LookupError, TypeError):
        return None  # whoever loads the model says what is wrong with it
