"""The state of a run as a file that is whole or absent, whenever the process ends."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from redmux.errors import DataLossError

CHECKPOINT_NAME = "checkpoint.pt"


def write_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Replaces the checkpoint in `folder`; when this returns, the new one survives a power cut."""
    partial = folder / f".{CHECKPOINT_NAME}-partial"
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / CHECKPOINT_NAME)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Returns the state in `folder`, None if there is none; raises DataLossError if damaged."""
    path = folder / CHECKPOINT_NAME
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as err:
        raise DataLossError(f"{path} is damaged: {err}; remove it to start again") from None
    return state
