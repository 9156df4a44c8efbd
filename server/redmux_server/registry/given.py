"""The adapters that a server is given at start: found, read and checked before its model loads."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import redmux_adapters
from redmux.errors import InvalidArgumentError, RedmuxError
from redmux_adapters import summarize
from redmux_adapters.format.config import CONFIG_NAME
from redmux_adapters.format.files import read_parts
from redmux_server.registry.names import check_name


@dataclass(frozen=True, slots=True)
class GivenAdapter:
    """The bytes of an adapter under the name that it will have; the file is not the server's."""

    name: str
    path: Path
    safetensors: bytes
    config_json: str | None

    def blamed(self, err: RedmuxError) -> RedmuxError:
        """Returns the error of this adapter with its path."""
        return type(err)(f"adapters: {self.path}: {err.message}")


def read_given(entries: Sequence[str]) -> list[GivenAdapter]:
    """Returns the adapters that the entries of the option `adapters` stand for.

    Checks all that can be known without the base model. Raises InvalidArgumentError, with the file
    and what to do, for what is not there, is no adapter or has no name of its own.
    """
    path_of: dict[str, Path] = {}
    for entry in entries:
        for name, path in _paths(entry):
            try:
                check_name(name)
            except InvalidArgumentError as err:
                remedy = f"name it yourself: --adapters {_usable(name)}={path}"
                raise InvalidArgumentError(f"adapters: {path}: {err.message}; {remedy}") from None
            if name in path_of:
                raise InvalidArgumentError(
                    f"adapters: {path_of[name]} and {path} would both be named {name!r}; give one "
                    f"of them another name: --adapters NAME={path}"
                )
            path_of[name] = path
    return [_read(name, path) for name, path in path_of.items()]


def zoo_folder() -> Path:
    """Returns the folder of the bundled adapters."""
    return Path(redmux_adapters.__file__).parent / "zoo"


def _paths(entry: str) -> list[tuple[str, Path]]:
    """Returns (name, path) of each adapter of one entry."""
    if entry == "zoo":
        return [(path.name, path) for path in _subfolders(zoo_folder())]
    name, separator, text = entry.partition("=")
    path = Path(text if separator else entry).expanduser()
    if not os.path.exists(path):  # false, too, where nobody may look
        raise InvalidArgumentError(
            f"adapters: there is no file or folder {str(path)!r}; give one of this machine, as "
            "PATH or NAME=PATH, or zoo for the bundled ones"
        )
    if separator:
        return [(name, path)]
    if not path.is_dir():
        return [(path.stem, path)]
    if (path / CONFIG_NAME).is_file():
        return [(path.resolve().name, path)]
    found = _subfolders(path)
    if not found:
        raise InvalidArgumentError(
            f"adapters: {path} has no adapter: neither {CONFIG_NAME} nor folders with one"
        )
    return [(folder.name, folder) for folder in found]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p.parent for p in folder.glob(f"*/{CONFIG_NAME}"))


def _read(name: str, path: Path) -> GivenAdapter:
    try:
        data, config_json = read_parts(path)
        summarize(data, config_json)
    except RedmuxError as err:
        raise type(err)(f"adapters: {path}: {err.message}") from None
    return GivenAdapter(name, path, data, config_json)


def _usable(name: str) -> str:
    """Returns a name that may be, as near as possible to one that may not."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).lstrip("._-")[:64] or "NAME"
