"""Files of adapters on disk."""

from pathlib import Path

from redmux_server.durable import refusals, sync_folder, write_whole
from redmux_server.registry.names import SUFFIX


def path_of(folder: Path, name: str) -> Path:
    """Returns where the adapter of this name is kept."""
    return folder / f"{name}{SUFFIX}"


def write(folder: Path, name: str, data: bytes) -> None:
    """Puts the file of an adapter in its place.

    Raises ResourceExhaustedError or FailedPreconditionError with the system's reason, if it has
    not become durable; what was in its place is there then.
    """
    with refusals(folder, f"adapter {name!r} is not kept", "adapter", "adapters"):
        path = path_of(folder, name)
        write_whole(path, data)
        if path.parent != folder:
            sync_folder(folder)


def remove(folder: Path, name: str) -> None:
    """Removes the file of an adapter, if there is one; raises as `write` does."""
    with refusals(folder, f"adapter {name!r} is not deleted", "adapter", "adapters"):
        path = path_of(folder, name)
        path.unlink(missing_ok=True)  # an adapter that was loaded from elsewhere has no file here
        if path.parent.is_dir():
            sync_folder(path.parent)
